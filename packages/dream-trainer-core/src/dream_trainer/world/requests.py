"""Requests: a request of one rank takes effect on all ranks at the same step, without blocking.

A rank that receives a signal, or whose background save failed, can't stop alone: the others would
wait for it in the next collective. A collective after each step would make each step wait for the
slowest host. So an exchange is started after one step and read after a later one, when it is
complete: an asynchronous all-reduce of a few integers on a separate CPU group, about once a second.

All ranks must start and read it after the same steps. Each exchange includes rank 0's measured step
duration; between two exchanges every rank advances the same virtual clock by it. If steps suddenly
take longer, a rank with a request makes the ranks agree on an earlier step (`early_exchange.py`).
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections import deque
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from dream_trainer.world.early_exchange import EarlyExchange
    from dream_trainer.world.world import World

Tick = Literal["train", "validate"]
"""The unit that was completed: an optimizer step, or a validation batch."""

_TICKS: tuple[Tick, ...] = get_args(Tick)
_WITHIN_US = 1_000_000
"""A request takes effect within this time, or within two steps if they take longer."""
_IN_FLIGHT_US = 120_000
"""Time from the start of an exchange until it is read."""
_NUM_DURATIONS = 5
_NUM_NAMES = 32
_UNKNOWN_US = 2**40


class Request:
    """A handle for requests of one name to all ranks. Made by `Requests.register`.

    Args:
        name: Name of the request.
        requests: The object that made it.
    """

    def __init__(self, name: str, requests: Requests) -> None:
        self.name = name
        self._requests = requests
        self._num_taken = requests.num_agreed(name)

    def ask(self, reason: str = "") -> None:
        """Make the request on this rank. Not collective; safe in threads and handlers."""
        self._requests.ask(self.name, reason)

    def take(self) -> bool:
        """Whether any rank made the request since the last call; the same on all ranks.

        Call it on all ranks in the same hook, such as `post_train_step`. Sends nothing.
        """
        num_agreed = self._requests.num_agreed(self.name)
        is_new = num_agreed > max(self._num_taken, self._requests.num_of_earlier_runs(self.name))
        self._num_taken = num_agreed
        return is_new

    def withdraw(self) -> None:
        """Drop a request of this rank that hasn't been sent yet. Not collective."""
        self._requests.withdraw(self.name)

    def reason(self) -> str:
        """The reason of the request; the lowest rank's if several made it. Collective, blocking."""
        return self._requests.reason(self.name)


class Requests:
    """The requests of a run. In a world of one a request takes effect at once.

    Callbacks call `register`; the loop calls the rest. The names "stop" and "save" are always
    registered: `trainer.stop` asks for the first, SIGUSR1 for the second.

    Args:
        world: The ranks of the run.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_distributed = world.is_distributed
        self._num_agreed = {"stop": 0, "save": 0}
        self._num_of_earlier_runs = dict(self._num_agreed)
        self._heard: set[str] = set()
        self._asked: dict[str, str] = {}  # reasons by name of requests not sent yet
        self._sent: dict[str, str] = {}  # of those in flight
        self._reasons: dict[str, str] = {}  # of this rank's requests that were agreed
        self._work: dist.Work | None = None
        self._values = torch.empty(0, dtype=torch.int64)
        self._sent_names: list[str] = []
        self._reads_next = False
        self._since_sent_us = _UNKNOWN_US
        self._tick_us: dict[Tick, int] = dict.fromkeys(_TICKS, _UNKNOWN_US)
        self._durations_s = {tick: deque[float](maxlen=_NUM_DURATIONS) for tick in _TICKS}
        self._last_tick_s: float | None = None
        self._last_tick: Tick = "train"
        self._early: EarlyExchange | None = None

    # For callbacks

    def register(self, name: str) -> Request:
        """A handle to make requests, and to receive those of any rank.

        Every rank must register the same names: in `pre_fit` of a Callback, for example, but not
        in a RankZeroCallback. All handles of one name receive each request.

        Raises:
            ValueError: If there are too many names.
        """
        if name not in self._num_agreed:
            if len(self._num_agreed) == _NUM_NAMES:
                raise ValueError(
                    f"request {name!r} would be number {_NUM_NAMES + 1}; an exchange between ranks "
                    f"holds {_NUM_NAMES} names, and {', '.join(self._num_agreed)} are registered: "
                    "use one name for several of them"
                )
            self._num_agreed[name] = self._num_of_earlier_runs[name] = 0
        self._heard.add(name)
        return Request(name, self)

    def ask(self, name: str, reason: str = "") -> None:
        """Make a request on this rank. Not collective; safe in threads and signal handlers.

        Raises:
            KeyError: If the name isn't registered.
        """
        if name not in self._num_agreed:
            raise KeyError(
                f"request {name!r} isn't registered; {', '.join(self._num_agreed)} are: call "
                f"trainer.requests.register({name!r}) on every rank, for example in pre_fit"
            )
        if self._is_distributed:
            self._asked[name] = reason
        else:
            self._reasons[name] = reason
            self._num_agreed[name] += 1

    def withdraw(self, name: str) -> None:
        """Drop a request of this rank that hasn't been sent yet. Not collective."""
        self._asked.pop(name, None)

    def reason(self, name: str) -> str:
        """The reason of a request; the lowest rank's, if several made it. Collective."""
        reasons = self._world.all_gather((self._reasons.get(name),))
        return next((reason for (reason,) in reasons if reason is not None), "")

    def is_heard(self, name: str) -> bool:
        """Whether `register` was called for the name on this rank."""
        return name in self._heard

    def num_agreed(self, name: str) -> int:
        """Number of agreed requests of this name, in all runs."""
        return self._num_agreed[name]

    def num_of_earlier_runs(self, name: str) -> int:
        """Number of agreed requests of this name before this run."""
        return self._num_of_earlier_runs[name]

    @property
    def is_in_flight(self) -> bool:
        """Whether an exchange was started and hasn't been read."""
        return self._work is not None

    # For the loop

    def forget(self) -> None:
        """Drop the requests of an earlier run. Not collective."""
        self._asked.clear()
        self._sent.clear()
        self._reasons.clear()
        self._num_of_earlier_runs = dict(self._num_agreed)

    def start(self) -> None:
        """Start the exchanges of a run. Collective the first time.

        Keeps requests that were made before: in `post_setup`, or by a signal.
        """
        self._world.group("requests")
        self._work = None
        self._reads_next = False
        self._since_sent_us = _UNKNOWN_US
        self._last_tick_s = None
        self._early = self._world.failure_monitor().start_early_exchange(self._would_be_late)

    def receive(self) -> bool:
        """Read the exchange if it is due. Called before the last hooks of a step.

        Returns:
            Whether one was read.

        Raises:
            ValueError: On all ranks, if they have registered different names.
        """
        if not self._reads_next:
            return False
        self._read()
        return True

    def send(self, tick: Tick) -> None:
        """Start an exchange if it is due. Called after the hooks of a step.

        Every rank must call it after the same steps and batches. It blocks only if a request would
        be late because steps have become longer: until the ranks agree on an earlier exchange.
        """
        if not self._is_distributed:
            return
        now_s, last_s = time.perf_counter(), self._last_tick_s
        self._last_tick_s, self._last_tick = now_s, tick
        if last_s is not None:
            self._durations_s[tick].append(now_s - last_s)
        self._since_sent_us += self._tick_us[tick]
        if self._work is not None:
            is_due = self._ticks_to_read(tick) <= 0
        else:
            is_due = self._ticks_to_start(tick) <= 0
        # A rank may have passed this tick before the others announced an earlier exchange: then
        # it acted as scheduled.
        if self._is_agreed_early() and not is_due:
            self._finish()
            self._start_exchange()
            self._read_next()
        elif is_due and self._work is not None:
            self._read_next()
        elif is_due:
            self._start_exchange()
            if self._tick_us[tick] > _IN_FLIGHT_US:
                self._read_next()

    def exchange(self) -> None:
        """Send and read at once. Collective, blocking.

        For points at which the ranks synchronize anyway: after an epoch or a validation.
        """
        if not self._is_distributed:
            return
        if self._early is not None:
            self._early.count_tick()
        self._finish()
        self._start_exchange()
        self._finish()
        self._last_tick_s = None  # the time until the next step isn't a step's

    def finish(self) -> None:
        """Read the exchange in flight, if any. Collective, blocking."""
        if self._early is not None:
            self._early.count_tick()  # a slower rank mustn't take it for an early exchange
        self._finish()

    def _finish(self) -> None:
        if self._work is not None:
            self._read_next()
            self._read()

    def _ticks_to_start(self, tick: Tick) -> float:
        """Number of ticks until an exchange is due, by the virtual clock."""
        within_us = _WITHIN_US - max(self._tick_us[tick], _IN_FLIGHT_US)
        return (within_us - self._since_sent_us) / self._tick_us[tick] - 1

    def _ticks_to_read(self, tick: Tick) -> float:
        """Number of ticks until the read of the one in flight is due."""
        return (_IN_FLIGHT_US - self._since_sent_us) / self._tick_us[tick] - 1

    def _is_agreed_early(self) -> bool:
        if self._early is None:
            return False
        self._early.count_tick()
        return self._early.is_agreed_now()

    def _would_be_late(self, tick_s: float) -> bool:
        """Whether a request would wait too long if ticks took so many seconds. In any thread."""
        if self._asked:
            num_ticks = self._ticks_to_start(self._last_tick)
        elif self._sent and not self._reads_next:
            num_ticks = self._ticks_to_read(self._last_tick)
        else:
            return False
        return num_ticks > 1 and num_ticks * tick_s > _WITHIN_US / 1e6

    # Exchanges

    def _start_exchange(self) -> None:
        names = self._sent_names = sorted(self._num_agreed)
        self._sent = {name: self._asked.pop(name) for name in names if name in self._asked}
        asked = [int(name in self._sent) for name in names]
        tick_us = [self._measured_us(tick) if self._world.rank == 0 else 0 for tick in _TICKS]
        digest = zlib.crc32("\n".join(names).encode())
        unused = [0] * (_NUM_NAMES - len(names))
        # The digests are equal if their maximum is minus the maximum of their negatives.
        self._values = torch.tensor([digest, -digest, *tick_us, *asked, *unused])
        group = self._world.group("requests")
        self._work = dist.all_reduce(self._values, dist.ReduceOp.MAX, group=group, async_op=True)
        self._since_sent_us = 0
        if self._early is not None:
            self._early.record_event()

    def _read_next(self) -> None:
        """Have the exchange in flight read by the next `receive`, if that isn't so yet."""
        if not self._reads_next:
            self._reads_next = True
            if self._early is not None:
                self._early.record_event()

    def _read(self) -> None:
        assert self._work is not None, "an exchange was started"
        self._work.wait()
        self._work, self._reads_next = None, False
        digest, minus_digest, *values = self._values.tolist()
        if digest != -minus_digest:
            self._world.agree(self._sent_names, "the registered requests")
            raise AssertionError("names with different digests differ")
        self._tick_us = dict(zip(_TICKS, values, strict=False))
        for name, is_asked in zip(self._sent_names, values[len(_TICKS) :], strict=False):
            if is_asked:
                self._num_agreed[name] += 1
                self._reasons.pop(name, None)
        self._reasons |= self._sent
        self._sent = {}

    def _measured_us(self, tick: Tick) -> int:
        """Median of the last durations, since some include a save or a validation."""
        durations_s = self._durations_s[tick]
        if not durations_s:
            return _UNKNOWN_US
        return max(int(statistics.median(durations_s) * 1e6), 1)
