"""ProfileCallback: record a few steps with torch.profiler, then let the run go on."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Self

from torch.profiler import ProfilerAction, ProfilerActivity, profile, supported_activities

from dream_callbacks.profile.profiler_windows import (
    GivenRecording,
    Recording,
    WindowRecording,
    Windows,
)
from dream_callbacks.profile.trace_files import how_to_view, write_trace
from dream_trainer.callbacks import Callback

logger = logging.getLogger(__name__)


class ProfileCallback(Callback):
    """Writes traces of some steps on chosen ranks; training goes on during and after it.

    By default three steps are recorded once, after five that are left out and two that get the
    profiler ready; then it is stopped and costs nothing any more. A *step* is an optimizer step
    with all its batches, and with what runs until the next one, such as other callbacks.
    Validation is left out: where it falls between recorded steps, the trace is cut in two.

    Each `fit` counts its own steps and profiles again. Other ranks do nothing, but wait for a
    profiled one while it writes its trace. A trace that can't be written is logged and doesn't
    end the run.

    A profiler of your own is started with the first training epoch, stepped after each optimizer
    step, stopped at the end of `fit`, and otherwise left alone: it records validation too if
    that falls between recorded steps, costs 6 µs per step while it waits (torch doesn't tell
    when a schedule is over), and in a second `fit` goes on where it stopped. Without an
    `on_trace_ready` it gets one that writes traces here.

    Args:
        profiler: A `torch.profiler.profile` that hasn't been started. Default: one that records
            the CPU and the run's device, made from the options that follow.
        wait: Steps to leave out before each recording.
        warmup: Steps before each recording whose values are thrown away.
        active: Steps in a recording.
        repeat: Number of recordings.
        skip_first: Steps to leave out once, at the beginning.
        record_shapes: Record shapes of inputs; TensorBoard can group operators by them.
        profile_memory: Record allocations, for TensorBoard's memory view.
        with_stack: Record where in the source an operator was called; slow.
        ranks: Global ranks to profile. None: all.
        output_dir: Where traces go. Default: `profile` in the run directory.

    Raises:
        ValueError: If a number is out of range, or options come with a profiler of your own.
    """

    def __init__(
        self,
        profiler: profile | None = None,
        *,
        wait: int = 0,
        warmup: int = 2,
        active: int = 3,
        repeat: int = 1,
        skip_first: int = 5,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        ranks: Collection[int] | None = (0,),
        output_dir: str | Path | None = None,
    ) -> None:
        self.windows = Windows(
            wait=wait, warmup=warmup, active=active, repeat=repeat, skip_first=skip_first
        )
        self.records: dict[str, Any] = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
        }
        if profiler is not None and (self.windows != Windows() or any(self.records.values())):
            raise ValueError(
                "a profiler of your own can't be combined with options for the default one; give "
                "them to torch.profiler.profile and torch.profiler.schedule instead"
            )
        if min(ranks or (), default=0) < 0:
            raise ValueError(
                f"ranks={ranks!r}: global ranks are whole numbers from 0; None means all of them"
            )
        self.profiler = profiler
        self.ranks = ranks
        self.output_dir = output_dir
        self._traces: list[Path] = []
        self._num_traces_before = 0
        self._recording: Recording | None = None

    @property
    def traces(self) -> tuple[Path, ...]:
        """Files that this rank has written, over all calls of `fit`."""
        return tuple(self._traces)

    def report(self) -> str:
        """What was recorded on this rank, and how to look at it."""
        if not self._traces:
            return "no trace was recorded on this rank"
        folder, num_traces = self._traces[-1].parent, len(self._traces)
        traces = "1 trace" if num_traces == 1 else f"{num_traces} traces"
        return f"{traces} in {folder}; {how_to_view(folder)}"

    # Hooks

    def pre_fit(self) -> None:
        self._end_recording()  # if an earlier fit was cut off before its post_fit
        self._num_traces_before = len(self._traces)
        if self._is_chosen(self.ranks):
            self._refuse_other_profilers()
            self._recording = self._new_recording()

    def pre_train_epoch(self) -> None:
        if self._recording is not None:
            self._recording.begin()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self._recording is None or self.trainer.is_accumulating_gradients:
            return
        self._recording.step()
        if isinstance(self._recording, WindowRecording) and self._recording.is_over:
            self._end_recording()

    def pre_validation_epoch(self) -> None:
        if self._recording is not None:
            self._recording.pause()

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        if self._recording is not None:
            self._recording.begin()

    def post_fit(self) -> None:
        recording = self._recording
        self._end_recording()
        if len(self._traces) > self._num_traces_before:
            logger.info("%s", self.report())
        elif (
            isinstance(recording, WindowRecording)
            and recording.num_steps  # none: the run was finished before
            and self.trainer.exception is None
        ):
            logger.warning(
                "fit ended after %d optimizer steps, and the first to be recorded was number %d; "
                "lower skip_first=%d, wait=%d or warmup=%d to get a trace",
                recording.num_steps,
                self.windows.num_steps_before + 1,
                self.windows.skip_first,
                self.windows.wait,
                self.windows.warmup,
            )

    # Inside

    def _is_chosen(self, ranks: Collection[int] | None) -> bool:
        return ranks is None or self.trainer.world.rank in ranks

    def _new_recording(self) -> Recording:
        if self.profiler is None:
            return WindowRecording(self.windows, self.trainer.global_step, self._default_profiler)
        if self.profiler.on_trace_ready is None:
            self.profiler.on_trace_ready = self._write
        return GivenRecording(self.profiler)

    def _default_profiler(self, schedule: Callable[[int], ProfilerAction]) -> profile:
        wanted = (ProfilerActivity.CPU, _ACTIVITY_OF.get(self.trainer.world.device.type))
        return profile(
            activities=[a for a in supported_activities() if a in wanted],
            schedule=schedule,
            on_trace_ready=self._write,
            **self.records,
        )

    def _end_recording(self) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.end()

    def _write(self, profiler: profile) -> None:
        folder = self.trainer.run_dir / "profile" if self.output_dir is None else self.output_dir
        try:
            path = write_trace(profiler, Path(folder), self.trainer.world.rank)
        except OSError as error:
            logger.error("a trace couldn't be written, and training goes on: %s", error)
            return
        self._traces.append(path)
        logger.info("wrote a trace that ends with step %d: %s", self.trainer.global_step, path)

    def _refuse_other_profilers(self) -> None:
        for name, other in self.trainer.callbacks.items():
            if other is not self and isinstance(other, ProfileCallback):
                if self._is_chosen(other.ranks):
                    raise ValueError(
                        f"there is another ProfileCallback for this rank, {name!r}: torch has one "
                        "profiler per process, and each would end the other's traces; keep one, "
                        "with repeat=… for several recordings"
                    )
        if _is_recording():
            raise RuntimeError(
                "a torch profiler is recording already, and torch has one per process; end it "
                "before fit(), or leave ProfileCallback out"
            )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_recording": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if self.profiler is not None:
            # What a profiler has recorded can't be copied: the copy's has recorded nothing.
            for recorded in (self.profiler.profiler, self.profiler.step_rec_fn):
                if recorded is not None:
                    memo[id(recorded)] = None
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(self.__getstate__(), memo))
        return copied


_ACTIVITY_OF = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
"""What the profiler calls a kind of device."""


def _is_recording() -> bool:
    from torch._C._autograd import _profiler_enabled  # there is no public one

    return _profiler_enabled()
