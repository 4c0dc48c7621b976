"""Recordings: torch's profiler on some optimizer steps of a run, in windows or as it was given."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

from torch.profiler import ProfilerAction, profile, schedule


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Which steps are recorded; the names are those of `torch.profiler.schedule`.

    Args:
        wait: Steps to leave out before each recording.
        warmup: Steps before each recording whose values are thrown away.
        active: Steps in a recording.
        repeat: Number of recordings.
        skip_first: Steps to leave out once, at the beginning.

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
        """Steps after which all is recorded."""
        cycle = self.wait + self.warmup + self.active
        return self.skip_first + cycle * self.repeat

    @property
    def num_steps_before(self) -> int:
        """Steps before the first that is recorded."""
        return self.skip_first + self.wait + self.warmup

    def schedule(self) -> Callable[[int], ProfilerAction]:
        """What to do in a step, from 0; all of it the same as torch's."""
        return schedule(**asdict(self))


class Recording(Protocol):
    """A profiler at work in one `fit`."""

    def begin(self) -> None:
        """Be at work for the step that comes; does nothing if it is already."""

    def step(self) -> None:
        """A step is done, and the next begins."""

    def pause(self) -> None:
        """Record nothing until `begin`."""

    def end(self) -> None:
        """Hand over what was recorded. Nothing else is called afterwards."""


class WindowRecording:
    """Records windows, each with a profiler of its own: none exists in between.

    Args:
        windows: Which steps.
        first_step: Number that the first step has in a trace.
        make_profiler: Makes a profiler with the given schedule, and doesn't start it.
    """

    def __init__(
        self,
        windows: Windows,
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
        """Whether nothing is left to record."""
        return self.num_steps >= self._windows.num_steps

    def begin(self) -> None:
        if self._profiler is not None or self._action(self.num_steps) is ProfilerAction.NONE:
            return
        profiler = self._make_profiler(self._action_of_run_step)
        # A new profiler counts from 0; like this a trace says which steps of the run it shows.
        profiler.step_num = self._first_step + self.num_steps
        profiler.current_action = self._action(self.num_steps)  # type: ignore[assignment]  # narrowed by torch's __init__
        with warnings.catch_warnings():
            # torch 2.11 warns before there is an earlier recording that could be cleared.
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
            self.begin()
        else:
            profiler.step()
            self._profiler = profiler  # not after an error, see GivenRecording

    def pause(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            if self._num_recorded == 0:
                profiler.on_trace_ready = None
            profiler.stop()

    def end(self) -> None:
        self.pause()

    def _action_of_run_step(self, step: int) -> ProfilerAction:
        # torch asks for step 0 when the profiler is made.
        return self._action(max(step - self._first_step, 0))


class GivenRecording:
    """Starts, steps and stops a profiler that has a schedule of its own.

    Args:
        profiler: Not started yet, or stopped.
    """

    def __init__(self, profiler: profile) -> None:
        self._profiler = profiler
        self._has_begun = False
        self._is_sound = False

    def begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._profiler.start()
            self._is_sound = True

    def step(self) -> None:
        # To stop a profiler that failed to start a trace is a segmentation fault.
        self._is_sound = False
        self._profiler.step()
        self._is_sound = True

    def pause(self) -> None:
        """Does nothing: the schedule is not ours."""

    def end(self) -> None:
        if self._is_sound:
            self._profiler.stop()
