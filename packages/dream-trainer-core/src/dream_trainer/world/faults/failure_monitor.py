"""FailureMonitor: reports the first error of any rank to all ranks, and ends all of them.

Other ranks may be stuck in a collective that the failed one never joins, so nothing here is a
collective. The first error is written to the rendezvous store. A thread of each rank polls for it
on its own connection; it also detects when the process of a rank on the same machine exits, and
when an NCCL collective of this rank fails or times out. It then interrupts the main thread for
clean-up, and aborts NCCL collectives, which the main thread may be waiting for. A main thread that
doesn't leave C++ code is ended with its process.

The main thread has no overhead until there is an error.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from dream_trainer.world import signals, torchrun
from dream_trainer.world.coordination import RankFailure
from dream_trainer.world.early_exchange import EarlyExchange
from dream_trainer.world.faults.device_collectives import DeviceCollectives
from dream_trainer.world.faults.failure import (
    Failure,
    Interruption,
    RemoteError,
    described,
    error_chain,
    is_lost_connection,
    is_timeout,
    place_of_main_thread,
    was_shown,
)
from dream_trainer.world.faults.failure_store import MAX_REQUESTS_PER_S, FailureStore
from dream_trainer.world.faults.local_processes import LocalProcesses
from dream_trainer.world.faults.process_exit import exit_now, exit_soon, write_line
from dream_trainer.world.rank_mismatch import grouped

if TYPE_CHECKING:
    from torch.distributed import Store

_POLL_EVERY_S = 0.2
_WAIT_S = 2.0
"""Wait for the failure that caused a lost connection, and at exit for threads and ranks."""
_SIGNAL_EVERY_S = 1.0
"""Interval of the signals that interrupt the main thread."""
_SIGTERM_REPORT_S = 25.0
"""Seconds after SIGTERM until the main thread's place is reported; torchrun kills after 30."""


class NoFailureMonitor:
    """For a world of one rank: does nothing. Methods as in FailureMonitor."""

    def watching(self, step: Callable[[], int]) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def start_early_exchange(self, would_be_late: Callable[[float], bool]) -> None:
        pass

    def report(self, error: BaseException, step: int) -> BaseException:
        return error

    def finish(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def close(self) -> None:
        pass


class FailureMonitor:
    """Reports an error on this rank to the others, and theirs to this one.

    Args:
        store: The store of all ranks; cloned to get a separate connection.
        rank: This rank.
        world_size: Number of ranks.
        cleanup_timeout_s: Seconds that this process may run after an error on any rank.
        device_collectives: Those of this rank.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        cleanup_timeout_s: float,
        device_collectives: DeviceCollectives,
    ) -> None:
        self._store = FailureStore(store, world_size)
        self._device_collectives = device_collectives
        self._rank = rank
        self._world_size = world_size
        self._cleanup_timeout_s = cleanup_timeout_s
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._first: Failure | None = None
        self._deadline_s = math.inf
        self._step: Callable[[], int] = int
        self._depth = 0
        self._span = 0  # number of calls of finish() that succeeded
        self._has_said_goodbye = False  # in this span
        self._has_left_loop = False
        self._place: str | None = None  # reported instead of the main thread's current place
        self._has_told_place = False
        self._thread: threading.Thread | None = None
        self._local_processes: LocalProcesses | None = None
        self._interrupts = False
        self._interruption: Interruption | None = None  # the last one raised in the main thread
        self._has_waited_for_error = False
        self._early_exchanges: list[EarlyExchange] = []  # several if runs are nested
        self._num_runs = 0
        self._num_questions = 0

    # What the loop calls

    @contextlib.contextmanager
    def watching(self, step: Callable[[], int]) -> Iterator[None]:
        """Monitor the other ranks inside; may be nested.

        Args:
            step: Returns the number of optimizer steps that this rank has completed.

        Raises:
            RemoteError: If another rank has failed already.
            Interruption: If another rank fails; at any place inside.
        """
        self._step = step
        if self._thread is None:
            self._start()
        if not self._depth:
            self._raise_if_failed()
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth = 0  # clean-up isn't interrupted
            raise
        self._depth -= 1

    def start_early_exchange(self, would_be_late: Callable[[float], bool]) -> EarlyExchange:
        """An EarlyExchange that the monitor's thread polls. Every rank calls it once per run."""
        self._num_runs += 1
        early = EarlyExchange(self._store, self._rank, self._num_runs, would_be_late)
        self._early_exchanges.append(early)
        return early

    def report(self, error: BaseException, step: int) -> BaseException:
        """Report an error to all ranks, unless another rank failed first.

        Starts the clean-up timeout. Not collective.

        Args:
            error: The error that left the loop on this rank.
            step: Optimizer steps completed.

        Returns:
            The error to raise: `error`, with a note that names the first failure; or a RemoteError
            if `error` is a consequence of another rank's, as any error after an interruption is.
        """
        self._depth = 0
        signals.ignore(signal.SIGCHLD)  # torch's handler would raise when a loader worker dies
        if isinstance(error, KeyboardInterrupt) and self._has_said_goodbye:
            return error  # while waiting for the others to finish: no rank has failed
        if isinstance(error, RemoteError):
            first = error.failure
            error.__notes__ = []  # they say where this rank was, which isn't the cause
        elif self._interruption is not None and not isinstance(error, KeyboardInterrupt):
            first = self._interruption.failure
            error = self._interruption.remote_error(error)
        else:
            # What comes after an abort may be its consequence, such as indices that are wrong.
            is_after_abort = self._device_collectives.are_aborted and isinstance(error, Exception)
            lost = is_after_abort or is_lost_connection(error)
            first = self._first_failure(error, step, lost=lost)
            if first.rank != self._rank and lost:
                error = Interruption(first).remote_error(error)
            else:
                error.add_note(str(first))
        self._set_first(first)
        is_mine = first.rank == self._rank
        torchrun.record_error(error, str(first), first.time_s + (not is_mine))
        return error

    def finish(self) -> None:
        """Stop monitoring after success, once all ranks have called this. Blocks without timeout.

        Afterwards the exit of this process isn't a failure.

        Raises:
            RemoteError: If another rank failed before all had called this.
        """
        self._raise_if_failed()
        if self._depth > 1:
            return  # the outer run goes on
        self._say_goodbye()
        self._store.count(f"finished/{self._span}")
        self._store.wait_for_all(f"finished/{self._span}", look=self._raise_if_failed)
        self._store.count(f"known/{self._span}")
        if self._rank == 0 and not torchrun.keeps_store():
            # The store ends with this process, when the others have read that all are here.
            self._store.wait_for_all(f"known/{self._span}", limit_s=_WAIT_S)
        self._stop()
        self._early_exchanges.clear()
        self._span += 1
        self._has_said_goodbye = False

    def leave(self) -> None:
        """The main thread has cleaned up after an error: it is on its own from here on."""
        signals.ignore(signal.SIGTERM)
        self._has_left_loop = True

    def close(self) -> None:
        """Say goodbye, and stop the thread."""
        if self._first is None:
            self._say_goodbye()
            self._stop()
            atexit.unregister(self._at_exit)

    def _say_goodbye(self) -> None:
        self._store.say_goodbye(self._rank, self._span)
        self._has_said_goodbye = True

    # What happened

    def _raise_if_failed(self) -> None:
        if self._first is not None:
            raise RemoteError(self._first)

    def _first_failure(self, error: BaseException, step: int, *, lost: bool) -> Failure:
        """The first failure: another rank's, or this error."""
        timed_out = is_timeout(error)
        wait_s = _WAIT_S if lost and not timed_out else 0.0
        first = self._first or self._store.first(wait_s=wait_s)
        if first is not None:
            return first
        what = f"failed in {described(error, step)}"
        if lost or timed_out:
            self._place = "waiting"
            self._store.tell_place(self._rank, self._place)
            what += f"; where each rank was: {grouped(self._store.where_ranks_are())}"
        is_on_all_ranks = isinstance(error, RankFailure)
        return self._store.publish(
            _failure(self._rank, self._pid, what, is_on_all_ranks=is_on_all_ranks)
        )

    def _set_first(self, first: Failure) -> None:
        """Keep the first failure and start the clean-up timeout, after which this process ends."""
        with self._lock:
            if self._first is not None:
                return
            signals.ignore(signal.SIGTERM)
            self._deadline_s = time.monotonic() + self._cleanup_timeout_s
            self._first = first
        self._store.count("seen")
        if self._local_processes is not None:
            self._local_processes.wake()

    # The thread

    def _start(self) -> None:
        atexit.register(self._at_exit)
        self._local_processes = LocalProcesses(self._store.client, self._rank, self._world_size)
        self._thread = threading.Thread(
            target=self._run, args=(self._local_processes,), name="failure-monitor", daemon=True
        )
        self._thread.start()
        self._interrupts = signals.attach_monitor(self, self._local_processes.waker)

    def _stop(self) -> None:
        thread, self._thread = self._thread, None
        local_processes, self._local_processes = self._local_processes, None
        if thread is not None and local_processes is not None:
            signals.detach_monitor(self, local_processes.waker)
            local_processes.wake()
            thread.join(_WAIT_S)
            if not thread.is_alive():
                local_processes.close()

    def _run(self, local_processes: LocalProcesses) -> None:
        report_place_at_s = math.inf
        while self._first is None:
            ended, written = local_processes.wait(self._poll_interval_s())
            if self._thread is not threading.current_thread():
                return
            must_end = signals.has_undecided_sigterm(written)
            if self._store.is_lost:
                self._on_lost_store()
            else:
                with self._store.may_be_lost():
                    self._check((*ended, *local_processes.find_new()), must_end)
            if must_end and self._first is None:
                signals.end_process_by(signal.SIGTERM)
            if signal.SIGTERM in written:  # other code handles it
                report_place_at_s = time.monotonic() + _SIGTERM_REPORT_S
            if time.monotonic() > report_place_at_s:
                report_place_at_s = math.inf
                write_line(
                    self._rank,
                    f"rank {self._rank} got SIGTERM {_SIGTERM_REPORT_S:g} s ago and is still in "
                    f"{place_of_main_thread()}",
                )
        self._interrupt_or_end()

    def _poll_interval_s(self) -> float:
        is_agreeing = any(early.is_agreeing for early in self._early_exchanges)
        interval_s = _POLL_EVERY_S / 4 if is_agreeing else _POLL_EVERY_S
        return max(interval_s, self._world_size / MAX_REQUESTS_PER_S)

    def _check(self, ended: tuple[tuple[int, int], ...], must_end: bool) -> None:
        """Check for a failure in the store, and for local processes that have exited."""
        for rank, pid in ended:
            self._on_process_exit(rank, pid, must_end)
        num_questions = self._store.num_questions()
        if num_questions != self._num_questions:
            self._num_questions = num_questions
            if not self._has_told_place and self._store.is_asked_where():
                self._has_told_place = True
                self._store.tell_place(self._rank, self._place or place_of_main_thread())
        for early in tuple(self._early_exchanges):
            early.poll(num_questions)
        first = self._store.first()
        if first is not None:
            self._set_first(first)
        elif must_end:
            self._store.tell_termination(self._rank)
        elif (what := self._device_collectives.failure()) is not None:
            self._on_failed_collective(what)

    def _on_failed_collective(self, what: str) -> None:
        """A collective on the device has failed, of which the main thread may know nothing."""
        found_at_s = time.time() - _WAIT_S  # torch may have found it at the poll before this one
        self._place = place_of_main_thread()
        self._store.tell_place(self._rank, self._place)
        places = grouped(self._store.where_ranks_are())
        # Meanwhile torch writes its trace, on every rank. An abort would prevent that.
        trace = self._device_collectives.trace_file(found_at_s)
        recorded = "" if trace is None else f"; flight recorder: {trace}"
        what = (
            f"failed in {self._place} at step {self._step()}: {what}{recorded}; "
            f"where each rank was: {places}"
        )
        self._set_first(self._store.publish(_failure(self._rank, self._pid, what)))

    def _on_process_exit(self, rank: int, pid: int, must_end: bool) -> None:
        """A process on this machine has exited, which is a failure unless it said goodbye."""
        if self._first is not None or self._store.has_said_goodbye(rank, self._span):
            return
        what = (
            "exited without reporting an error: killed (SIGKILL, out of memory?), crashed, or "
            "os._exit"
        )
        if self._store.was_terminated(rank):
            if must_end:  # all ranks got SIGTERM
                return
            what = "was ended by SIGTERM"
        what += f"; rank {self._rank} was at step {self._step()}"
        mine = _failure(rank, pid, what)
        first = self._store.publish(mine)
        if first == mine:
            self._store.count("seen")  # on behalf of that process
        self._set_first(first)

    def _on_lost_store(self) -> None:
        if not torchrun.keeps_store() and self._rank != 0 and self._depth:
            host = os.environ.get("MASTER_ADDR", "")
            what = "is gone, and with it the store of all ranks"
            self._set_first(Failure(0, 0, host, what, time.time()))

    def _interrupt_or_end(self) -> None:
        """Interrupt the main thread, or end the process at the deadline."""
        signal_at_s = time.monotonic()
        if self._first is not None and self._first.is_on_all_ranks:
            signal_at_s += _WAIT_S  # the main thread is about to raise it
        while not self._has_left_loop and time.monotonic() < self._deadline_s:
            if time.monotonic() >= signal_at_s:
                if self._depth and self._interrupts:
                    signal_at_s = time.monotonic() + _SIGNAL_EVERY_S
                    signals.interrupt_main_thread()
                self._device_collectives.abort()
            time.sleep(0.02)
        if not self._has_left_loop:
            exit_now(self._rank, self._first)
        while threading.main_thread().is_alive():
            time.sleep(0.05)
        # Python now joins the threads of callbacks; one may be stuck in a collective.
        left_s = self._deadline_s + _WAIT_S - time.monotonic()
        time.sleep(max(left_s, self._cleanup_timeout_s))
        exit_now(self._rank, self._first)

    # The end

    @property
    def has_failed(self) -> bool:
        """Whether a rank has failed, so that this process will exit."""
        return self._first is not None

    def interrupt(self) -> None:
        """Raise an Interruption in the main thread, which calls this in a signal handler.

        Called repeatedly while the main thread is in the loop: an interruption that was swallowed
        is raised again, except while one is being handled, in a `finally` for example. Another
        error that is being handled may be on its way out of the loop: it has until the next call.
        """
        if not self._depth or self._first is None:
            return
        handled = sys.exception()
        if handled is not None and not self._has_waited_for_error:
            self._has_waited_for_error = True
            return
        if self._interruption is None or self._interruption not in error_chain(handled):
            self._interruption = Interruption(self._first)
            raise self._interruption

    def _at_exit(self) -> None:
        """After an error, make sure that the others know, and that this process exits."""
        if os.getpid() != self._pid:
            return
        if self._first is None:
            self.close()
            return
        if not was_shown(self._first):
            write_line(self._rank, str(self._first))
        self._store.wait_for_all("seen", limit_s=_WAIT_S)
        exit_soon()


def _failure(rank: int, pid: int, what: str, *, is_on_all_ranks: bool = False) -> Failure:
    return Failure(rank, pid, socket.gethostname(), what, time.time(), is_on_all_ranks)
