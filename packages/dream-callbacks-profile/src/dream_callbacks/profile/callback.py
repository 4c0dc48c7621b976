"""ProfileCallback: records a few steps of a run with torch.profiler."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Self

from torch.profiler import ProfilerAction, ProfilerActivity, profile, supported_activities

from dream_callbacks.profile.profiler_windows import (
    ProfilerRun,
    ProfilerWindows,
    UserProfiler,
    WindowedProfiler,
)
from dream_callbacks.profile.trace_files import how_to_view, write_trace
from dream_trainer.callbacks import Callback

logger = logging.getLogger(__name__)


class ProfileCallback(Callback):
    """Writes traces of some steps on selected ranks; training continues during and after it.

    By default three steps are recorded once, after five skipped and two warm-up steps; then the
    profiler is stopped and has no overhead. A *step* is an optimizer step with all its batches and
    everything that runs until the next one, such as other callbacks. Validation is not recorded:
    if it falls between recorded steps, the trace is split in two.

    Each `fit` counts its own steps and profiles again. Other ranks do nothing, but wait for a
    profiled rank while it writes its trace. A trace that can't be written is logged and doesn't
    end the run.

    A profiler passed by the user is started with the first training epoch, stepped after each
    optimizer step and stopped at the end of `fit`. It also records validation between recorded
    steps, costs 6 µs per step after its schedule is over (torch doesn't report that), and
    continues in a second `fit`. Without an `on_trace_ready`, this callback writes its traces.

    Args:
        profiler: A `torch.profiler.profile` that hasn't been started. Default: one that records
            the CPU and the run's device, configured by the following options.
        wait: Steps to skip before each recording.
        warmup: Steps before each recording whose values are discarded.
        active: Steps in a recording.
        repeat: Number of recordings.
        skip_first: Steps to skip once, at the beginning.
        record_shapes: Record shapes of inputs; TensorBoard can group operators by them.
        profile_memory: Record allocations, for TensorBoard's memory view.
        with_stack: Record source locations of operators; slow.
        ranks: Global ranks to profile. None: all.
        output_dir: Directory for traces. Default: `profile` in the run directory.

    Raises:
        ValueError: If a number is out of range, or options are given with `profiler`.
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
        self.windows = ProfilerWindows(
            wait=wait, warmup=warmup, active=active, repeat=repeat, skip_first=skip_first
        )
        self.records: dict[str, Any] = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
        }
        if profiler is not None and (
            self.windows != ProfilerWindows() or any(self.records.values())
        ):
            raise ValueError(
                "profiler can't be combined with options for the default profiler; pass them to "
                "torch.profiler.profile and torch.profiler.schedule instead"
            )
        if min(ranks or (), default=0) < 0:
            raise ValueError(
                f"ranks={ranks!r}: global ranks are whole numbers from 0; None means all ranks"
            )
        self.profiler = profiler
        self.ranks = ranks
        self.output_dir = output_dir
        self._traces: list[Path] = []
        self._num_traces_before = 0
        self._profiler_run: ProfilerRun | None = None

    @property
    def traces(self) -> tuple[Path, ...]:
        """Trace files written by this rank, over all calls of `fit`."""
        return tuple(self._traces)

    def report(self) -> str:
        """Where this rank's traces are and how to view them."""
        if not self._traces:
            return "no trace was recorded on this rank"
        folder, num_traces = self._traces[-1].parent, len(self._traces)
        traces = "1 trace" if num_traces == 1 else f"{num_traces} traces"
        return f"{traces} in {folder}; {how_to_view(folder)}"

    # Hooks

    def pre_fit(self) -> None:
        self._stop_profiler()  # if an earlier fit ended without post_fit
        self._num_traces_before = len(self._traces)
        if self._is_chosen(self.ranks):
            self._check_other_profilers()
            self._profiler_run = self._new_profiler_run()

    def pre_train_epoch(self) -> None:
        if self._profiler_run is not None:
            self._profiler_run.resume()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self._profiler_run is None or self.trainer.is_accumulating_gradients:
            return
        self._profiler_run.step()
        if isinstance(self._profiler_run, WindowedProfiler) and self._profiler_run.is_over:
            self._stop_profiler()

    def pre_validation_epoch(self) -> None:
        if self._profiler_run is not None:
            self._profiler_run.pause()

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        if self._profiler_run is not None:
            self._profiler_run.resume()

    def post_fit(self) -> None:
        run = self._profiler_run
        self._stop_profiler()
        if len(self._traces) > self._num_traces_before:
            logger.info("%s", self.report())
        elif (
            isinstance(run, WindowedProfiler)
            and run.num_steps  # 0 if the run had already finished
            and self.trainer.exception is None
        ):
            logger.warning(
                "fit ended after %d optimizer steps, before the first recorded step, number %d; "
                "lower skip_first=%d, wait=%d or warmup=%d to get a trace",
                run.num_steps,
                self.windows.num_steps_before + 1,
                self.windows.skip_first,
                self.windows.wait,
                self.windows.warmup,
            )

    # Internals

    def _is_chosen(self, ranks: Collection[int] | None) -> bool:
        return ranks is None or self.trainer.world.rank in ranks

    def _new_profiler_run(self) -> ProfilerRun:
        if self.profiler is None:
            return WindowedProfiler(self.windows, self.trainer.global_step, self._default_profiler)
        if self.profiler.on_trace_ready is None:
            self.profiler.on_trace_ready = self._write
        return UserProfiler(self.profiler)

    def _default_profiler(self, schedule: Callable[[int], ProfilerAction]) -> profile:
        wanted = (ProfilerActivity.CPU, _ACTIVITY_OF.get(self.trainer.world.device.type))
        return profile(
            activities=[a for a in supported_activities() if a in wanted],
            schedule=schedule,
            on_trace_ready=self._write,
            **self.records,
        )

    def _stop_profiler(self) -> None:
        run, self._profiler_run = self._profiler_run, None
        if run is not None:
            run.stop()

    def _write(self, profiler: profile) -> None:
        folder = self.trainer.run_dir / "profile" if self.output_dir is None else self.output_dir
        try:
            path = write_trace(profiler, Path(folder), self.trainer.world.rank)
        except OSError as error:
            logger.error("a trace couldn't be written; training continues: %s", error)
            return
        self._traces.append(path)
        logger.info("wrote a trace that ends with step %d: %s", self.trainer.global_step, path)

    def _check_other_profilers(self) -> None:
        for name, other in self.trainer.callbacks.items():
            if other is not self and isinstance(other, ProfileCallback):
                if self._is_chosen(other.ranks):
                    raise ValueError(
                        f"another ProfileCallback profiles this rank, {name!r}: torch has one "
                        "profiler per process, and each would end the other's traces; keep one, "
                        "with repeat=… for several recordings"
                    )
        if _is_recording():
            raise RuntimeError(
                "a torch profiler is already recording, and torch has one per process; stop it "
                "before fit(), or remove ProfileCallback"
            )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_profiler_run": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if self.profiler is not None:
            # Recorded events can't be copied: the copied profiler has none.
            for recorded in (self.profiler.profiler, self.profiler.step_rec_fn):
                if recorded is not None:
                    memo[id(recorded)] = None
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(self.__getstate__(), memo))
        return copied


_ACTIVITY_OF = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
"""Profiler activity by device type."""


def _is_recording() -> bool:
    from torch._C._autograd import _profiler_enabled  # no public equivalent

    return _profiler_enabled()
