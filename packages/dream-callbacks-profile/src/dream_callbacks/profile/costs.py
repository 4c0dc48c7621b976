"""CallbackCostCallback: host time of each callback in each hook."""

from __future__ import annotations

import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dream_trainer.callbacks import Callback, CallbackCollection
from dream_trainer.callbacks.callback import CONTEXTS, HOOKS
from dream_trainer.callbacks.order import ordered

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """Host time of one hook of a callback.

    Attributes:
        num_calls: Number of calls.
        total_s: Total host time in seconds.
    """

    num_calls: int
    total_s: float

    @property
    def mean_us(self) -> float:
        """Microseconds per call."""
        return self.total_s / self.num_calls * 1e6


class CallbackCostCallback(Callback):
    """Measures the host time of every callback's hooks during some optimizer steps.

    Clocks are inserted between the callbacks, as callbacks; no callback is wrapped or changed.
    They are in the collection only while measuring and cost about 1 µs per callback and hook,
    which is subtracted. The most expensive hooks are logged after these steps. Contexts and hooks
    before training aren't measured. The time of a callback added while measuring is attributed to
    its neighbor.

    Args:
        skip: Optimizer steps to skip at the beginning of each `fit`.
        num_steps: Optimizer steps to measure, including validation and epoch ends between them.

    Raises:
        ValueError: If `skip` is below 0 or `num_steps` below 1.
    """

    def __init__(self, skip: int = 5, *, num_steps: int = 100) -> None:
        if skip < 0 or num_steps < 1:
            raise ValueError(
                f"skip={skip}, num_steps={num_steps}: at least 0 and at least 1 are required"
            )
        self.skip = skip
        self.num_steps = num_steps
        self._costs: dict[tuple[str, str], Cost] = {}
        self._clocks: _Clocks | None = None
        self._is_enabled = False

    @property
    def costs(self) -> Mapping[tuple[str, str], Cost]:
        """Costs in the last `fit` on this rank, by callback name and hook; most expensive first."""
        return self._costs

    def pre_fit(self) -> None:
        self._costs = {}
        self._clocks = None
        self._is_enabled = True
        self._first_step = self.trainer.global_step

    def pre_train_epoch(self) -> None:
        self._start_if_due()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if not self._is_enabled or self.trainer.is_accumulating_gradients:
            return
        if self.trainer.global_step - self._first_step == self.skip + self.num_steps:
            self._finish()
        self._start_if_due()

    def post_fit(self) -> None:
        self._finish()

    def _start_if_due(self) -> None:
        num_done = self.trainer.global_step - self._first_step
        if self._is_enabled and self._clocks is None and num_done >= self.skip:
            own = next(name for name, cb in self.trainer.callbacks.items() if cb is self)
            self._clocks = _Clocks(self.trainer.callbacks, own)
            self._started_s = time.perf_counter()

    def _finish(self) -> None:
        clocks, self._clocks = self._clocks, None
        self._is_enabled = False
        if clocks is not None:
            elapsed_s = time.perf_counter() - self._started_s
            self._costs = clocks.remove()
            if self.trainer.world.is_global_zero:
                logger.info("%s", _table(self._costs, elapsed_s))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_clocks": None}


class _Clocks:
    """Clock callbacks before the first, between all, and after the last callback of a collection.

    Args:
        callbacks: Collection that holds the clocks until `remove`.
        own: Name of the callback that isn't reported.
    """

    def __init__(self, callbacks: CallbackCollection, own: str) -> None:
        self._callbacks = callbacks
        self._last_s = 0.0
        self._times_s: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._reported = {
            (name, hook)
            for hook, names in callbacks.plan().hooks.items()
            for name in names
            if name != own
        }
        names = ordered(dict(callbacks.items()))
        self._clock_names = ["clock before all", *(f"clock after {name}" for name in names)]
        for clock_name, earlier, later in zip(
            self._clock_names, [None, *names], [*names, None], strict=True
        ):
            clock = _new_clock(self._tick, earlier)
            # The instance: a name would also match all callbacks of a class with that name.
            clock.after = () if earlier is None else (callbacks[earlier],)
            clock.before = () if later is None else (callbacks[later],)
            callbacks.append(clock, clock_name)

    def remove(self) -> dict[tuple[str, str], Cost]:
        """Remove the clocks from the collection.

        Returns:
            Cost of each hook without the clocks' own time, most expensive first.
        """
        for name in self._clock_names:
            self._callbacks.pop(name, None)
        # Times between two clocks around a callback without the hook: the clocks' own cost.
        idle_s = [t for key, ts in self._times_s.items() if key not in self._reported for t in ts]
        clock_s = statistics.median(idle_s) if idle_s else 0.0
        costs = {
            key: Cost(len(times_s), max(0.0, sum(times_s) - len(times_s) * clock_s))
            for key, times_s in self._times_s.items()
            if key in self._reported
        }
        return dict(sorted(costs.items(), key=lambda item: -item[1].total_s))

    def _tick(self, earlier: str | None, hook: str) -> None:
        now_s = time.perf_counter()
        if earlier is not None:
            self._times_s[earlier, hook].append(now_s - self._last_s)
        self._last_s = time.perf_counter()


class _Clock(Callback):
    # Set for each instance.
    before: Collection[Any] = ()  # type: ignore[misc]  # a class variable in Callback
    after: Collection[Any] = ()  # type: ignore[misc]


def _new_clock(tick: Callable[[str | None, str], None], earlier: str | None) -> _Clock:
    """A callback that calls `tick` in every hook."""

    def ticking(hook: str) -> Callable[..., None]:
        def method(self: Callback, *args: Any) -> None:
            tick(earlier, hook)

        return method

    hooks = {hook: ticking(hook) for hook in HOOKS if hook not in CONTEXTS}
    clock: _Clock = type("Clock", (_Clock,), hooks)()
    return clock


def _table(costs: Mapping[tuple[str, str], Cost], elapsed_s: float, limit: int = 20) -> str:
    total_s = sum(cost.total_s for cost in costs.values())
    title = (
        f"callbacks took {total_s * 1e3:.3g} ms of {elapsed_s * 1e3:.3g} ms "
        f"({total_s / elapsed_s:.1%}); the most expensive hooks:"
    )
    shown = list(costs.items())[:limit]
    width = max((len(f"{name}.{hook}") for (name, hook), _ in shown), default=0)
    lines = [
        f"  {f'{name}.{hook}':<{width}}  {cost.num_calls:>7} × {cost.mean_us:>9.1f} µs"
        f"  {cost.total_s / elapsed_s:>6.1%}"
        for (name, hook), cost in shown
    ]
    return "\n".join([title, *lines])
