"""TensorBoardSink: event files that `tensorboard --logdir` shows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dream_callbacks.logging.frames import figure_png, image_frames, video_frames
from dream_callbacks.logging.png import Frame, animated_png
from dream_callbacks.logging.sinks.background import BackgroundSink
from dream_callbacks.logging.sinks.base import DeferredSink, Histogram, LoggedRun, OpenedSink
from dream_callbacks.logging.source_files import source_files
from dream_callbacks.logging.to_jsonable import as_number, encode_non_finite, to_jsonable


class TensorBoardSink(DeferredSink):
    """Writes events for TensorBoard, on its own thread.

    A resumed run hides earlier events after the step at which it resumed, since these steps are
    logged again.

    Args:
        directory: Directory relative to the run directory.
        flush_s: A killed process loses at most this many seconds.
    """

    survives_crash = False

    def __init__(
        self, directory: str | os.PathLike[str] = "tensorboard", *, flush_s: int = 10
    ) -> None:
        self.directory = Path(directory)
        self.flush_s = flush_s

    def check(self) -> None:
        if find_spec("tensorboard") is None:
            raise ImportError(
                "TensorBoardSink needs tensorboard: "
                "pip install 'dream-callbacks-logging[tensorboard]'"
            )

    def open(self, run: LoggedRun) -> OpenedSink:
        self.check()
        # Not on the thread: if the process forks while the thread holds an import lock, the child
        # hangs.
        from torch.utils.tensorboard import SummaryWriter

        directory = run.run_dir / self.directory
        directory.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(
            str(directory),
            purge_step=run.step + 1 if any(directory.iterdir()) and not run.is_evaluation else None,
            flush_secs=self.flush_s,
        )
        return BackgroundSink("TensorBoard", lambda: _EventFile(writer, run))


class _EventFile(OpenedSink):
    """Runs on the thread of a BackgroundSink, which handles its errors."""

    def __init__(self, writer: Any, run: LoggedRun) -> None:
        self._writer = writer
        self._run = run

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            number = as_number(value)
            if number is not None:
                self._writer.add_scalar(name, number, step)

    def log_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        self._writer.add_histogram_raw(
            name,
            min=histogram.edges[0],
            max=histogram.edges[-1],
            num=sum(histogram.counts),
            sum=histogram.total,
            sum_squares=histogram.total_of_squares,
            bucket_limits=list(histogram.edges[1:]),
            bucket_counts=list(histogram.counts),
            global_step=step,
        )

    def log_images(self, name: str, images: Any, step: int, captions: Any = None) -> None:
        for index, frame in enumerate(image_frames(images)):
            self._add_picture(f"{name}/{index}", frame, frame.png, step)
        if captions is not None:
            self._add_text(f"{name}/captions", to_jsonable(captions), step)

    def log_videos(self, name: str, videos: Any, step: int, fps: int = 8) -> None:
        for index, frames in enumerate(video_frames(videos)):
            self._add_picture(f"{name}/{index}", frames[0], animated_png(frames, fps), step)

    def log_plot(self, name: str, figure: Any, step: int) -> None:
        picture = figure_png(figure)
        if picture:
            width = int.from_bytes(picture[16:20], "big")  # size in the PNG header
            height = int.from_bytes(picture[20:24], "big")
            self._add_picture(name, Frame(width, height, 3, b""), picture, step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._add_text("config", to_jsonable(config), self._run.step)

    def log_code(self, directory: Path) -> None:
        sources = source_files(directory, leave_out=self._run.run_dir)
        self._add_text("code", list(sources.paths), self._run.step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, error: BaseException | None = None) -> None:
        if error is not None:
            self._add_text("error", f"{type(error).__name__}: {error}", self._run.step)
        self._writer.close()

    def _add_text(self, name: str, value: Any, step: int) -> None:
        text = value if isinstance(value, str) else json.dumps(encode_non_finite(value), indent=2)
        self._writer.add_text(name, f"```\n{text}\n```", step)  # a Markdown code block

    def _add_picture(self, name: str, frame: Frame, encoded: bytes, step: int) -> None:
        # add_image would decode and re-encode; add_video would need moviepy, while browsers play
        # animated PNGs.
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(
            height=frame.height,
            width=frame.width,
            colorspace=frame.channels,
            encoded_image_string=encoded,
        )
        self._writer.file_writer.add_summary(
            Summary(value=[Summary.Value(tag=name, image=image)]), step
        )
