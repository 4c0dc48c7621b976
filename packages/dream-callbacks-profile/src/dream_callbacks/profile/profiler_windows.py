"""torch.profiler on some optimizer steps of a run: in windows, or with the user's schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

from torch.profiler import ProfilerAction, profile, schedule


@dataclass(frozen=True, kw_only=True)
class ProfilerWindows:
    """Steps to record; the names are those of `torch.profiler.schedule`.

    Args:
        wait: Steps to skip before each recording.
        warmup: Steps before each recording whose values are discarded.
        active: Steps in a recording.
        repeat: Number of recordings.
        skip_first: Steps to skip once, at the beginning.

    Raises:
        ValueError: If a number is out of range.
    """

    wait: int = 0
    warmup: int = 2
    active: int = 3
    repeat: int = 1
    skip_first: int = 5

    def __post_init__(self) -> None:
        for name, count in asdict(self).items():
            lowest = 1 if name in ("active", "repeat") else 0
            if isinstance(count, bool) or not isinstance(count, int) or count < lowest:
                raise ValueError(
                    f"{name}={count!r}: a whole number of at least {lowest} is required"
                )

    @property
    def num_steps(self) -> int:
        """Number of steps until the last recording is complete."""
        cycle = self.wait + self.warmup + self.active
        return self.skip_first + cycle * self.repeat

    @property
    def num_steps_before(self) -> int:
        """Number of steps before the first recorded one."""
        return self.skip_first + self.wait + self.warmup

    def schedule(self) -> Callable[[int], ProfilerAction]:
        """The equivalent schedule of torch.profiler, by step from 0."""
        return schedule(**asdict(self))


class ProfilerRun(Protocol):
    """A profiler during one `fit`."""

    def resume(self) -> None:
        """Prepare for the next step; no effect if already running."""

    def step(self) -> None:
        """End a step and start the next."""

    def pause(self) -> None:
        """Record nothing until `resume`."""

    def stop(self) -> None:
        """Save the recording. No other method is called afterwards."""


class WindowedProfiler:
    """Records windows, with a new profiler for each; none exists in between.

    Args:
        windows: Steps to record.
        first_step: Number of the first step in traces.
        make_profiler: Creates a profiler with the given schedule, without starting it.
    """

    def __init__(
        self,
        windows: ProfilerWindows,
        first_step: int,
        make_profiler: Callable[[Callable[[int], ProfilerAction]], profile],
    ) -> None:
        self.num_steps = 0
        self._windows = windows
        self._first_step = first_step
        self._make_profiler = make_profiler
        self._action = windows.schedule()
        self._profiler: profile | None = None
        self._num_recorded = 0

    @property
    def is_over(self) -> bool:
        """Whether the last recording is complete."""
        return self.num_steps >= self._windows.num_steps

    def resume(self) -> None:
        if self._profiler is not None or self._action(self.num_steps) is ProfilerAction.NONE:
            return
        profiler = self._make_profiler(self._action_at_step)
        # A new profiler counts from 0; with this, the trace shows the run's step numbers.
        profiler.step_num = self._first_step + self.num_steps
        profiler.current_action = self._action(self.num_steps)  # type: ignore[assignment]  # narrowed by torch's __init__
        with warnings.catch_warnings():
            # torch 2.11 warns although there is no earlier recording to clear.
            warnings.filterwarnings("ignore", message=".*Profiler clears events")
            profiler.start()
        self._profiler, self._num_recorded = profiler, 0

    def step(self) -> None:
        action = self._action(self.num_steps)
        self.num_steps += 1
        if action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE):
            self._num_recorded += 1
        if action is ProfilerAction.RECORD_AND_SAVE:
            self.pause()
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            self.resume()
        else:
            profiler.step()
            self._profiler = profiler  # not after an error, see UserProfiler

    def pause(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            if self._num_recorded == 0:
                profiler.on_trace_ready = None
            profiler.stop()

    def stop(self) -> None:
        self.pause()

    def _action_at_step(self, step: int) -> ProfilerAction:
        # torch calls this with step 0 in the profiler's constructor.
        return self._action(max(step - self._first_step, 0))


class UserProfiler:
    """Starts, steps and stops a profiler with its own schedule.

    Args:
        profiler: A profiler that isn't running.
    """

    def __init__(self, profiler: profile) -> None:
        self._profiler = profiler
        self._has_started = False
        self._can_stop = False

    def resume(self) -> None:
        if not self._has_started:
            self._has_started = True
            self._profiler.start()
            self._can_stop = True

    def step(self) -> None:
        # Stopping a profiler that failed to start a trace is a segmentation fault.
        self._can_stop = False
        self._profiler.step()
        self._can_stop = True

    def pause(self) -> None:
        """Does nothing: the profiler follows its own schedule."""

    def stop(self) -> None:
        if self._can_stop:
            self._profiler.stop()
