"""CallbackCostCallback: how much time each callback takes in each hook."""

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
    """What a callback's hook takes.

    Attributes:
        num_calls: How often it was called.
        total_s: Host seconds in all.
    """

    num_calls: int
    total_s: float

    @property
    def mean_us(self) -> float:
        """Microseconds per call."""
        return self.total_s / self.num_calls * 1e6


class CallbackCostCallback(Callback):
    """Measures the host time of every callback's hooks during some optimizer steps.

    Clocks are put between the callbacks, as callbacks of their own; none is wrapped or changed.
    They are in the collection while it measures, cost 1 µs or so per callback and hook, and what
    they cost themselves is subtracted. The most expensive hooks are logged when the steps are
    done. Contexts and what runs before training aren't measured. A callback that is added
    meanwhile counts for its neighbour.

    Args:
        skip: Optimizer steps at the beginning of each `fit` that are left out.
        num_steps: Optimizer steps to measure, with the validation and epoch ends between them.

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
        self._is_wanted = False

    @property
    def costs(self) -> Mapping[tuple[str, str], Cost]:
        """Of the last `fit` on this rank, by name of the callback and hook; dearest first."""
        return self._costs

    def pre_fit(self) -> None:
        self._costs = {}
        self._clocks = None
        self._is_wanted = True
        self._first_step = self.trainer.global_step

    def pre_train_epoch(self) -> None:
        self._start_if_due()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if not self._is_wanted or self.trainer.is_accumulating_gradients:
            return
        if self.trainer.global_step - self._first_step == self.skip + self.num_steps:
            self._finish()
        self._start_if_due()

    def post_fit(self) -> None:
        self._finish()

    def _start_if_due(self) -> None:
        num_done = self.trainer.global_step - self._first_step
        if self._is_wanted and self._clocks is None and num_done >= self.skip:
            own = next(name for name, cb in self.trainer.callbacks.items() if cb is self)
            self._clocks = _Clocks(self.trainer.callbacks, own)
            self._started_s = time.perf_counter()

    def _finish(self) -> None:
        clocks, self._clocks = self._clocks, None
        self._is_wanted = False
        if clocks is not None:
            elapsed_s = time.perf_counter() - self._started_s
            self._costs = clocks.remove()
            if self.trainer.world.is_global_zero:
                logger.info("%s", _table(self._costs, elapsed_s))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_clocks": None}


class _Clocks:
    """Callbacks before the first, between all, and after the last one of a collection.

    Args:
        callbacks: Holds them until `remove`.
        own: Name of a callback that isn't reported.
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
            # Itself: a name would stand for all callbacks of a class of that name, too.
            clock.after = () if earlier is None else (callbacks[earlier],)
            clock.before = () if later is None else (callbacks[later],)
            callbacks.append(clock, clock_name)

    def remove(self) -> dict[tuple[str, str], Cost]:
        """Take the clocks out again.

        Returns:
            What each hook took beyond a clock's own time; the dearest first.
        """
        for name in self._clock_names:
            self._callbacks.pop(name, None)
        # Between two clocks around a callback that doesn't have the hook.
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
    # They differ between instances.
    before: Collection[Any] = ()  # type: ignore[misc]  # a class variable of Callback's
    after: Collection[Any] = ()  # type: ignore[misc]


def _new_clock(tick: Callable[[str | None, str], None], earlier: str | None) -> _Clock:
    """A callback that ticks in every hook."""

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
        f"({total_s / elapsed_s:.1%}); the dearest hooks:"
    )
    shown = list(costs.items())[:limit]
    width = max((len(f"{name}.{hook}") for (name, hook), _ in shown), default=0)
    lines = [
        f"  {f'{name}.{hook}':<{width}}  {cost.num_calls:>7} × {cost.mean_us:>9.1f} µs"
        f"  {cost.total_s / elapsed_s:>6.1%}"
        for (name, hook), cost in shown
    ]
    return "\n".join([title, *lines])
