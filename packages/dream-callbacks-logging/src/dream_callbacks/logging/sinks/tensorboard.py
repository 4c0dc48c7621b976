"""TensorBoardSink: event files that `tensorboard --logdir` shows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dream_callbacks.logging.frames import images_of, png_of_figure, videos_of
from dream_callbacks.logging.png import Frame, animated_png
from dream_callbacks.logging.sinks.background import BackgroundSink
from dream_callbacks.logging.sinks.base import DeferredSink, Histogram, LoggedRun, OpenedSink
from dream_callbacks.logging.source_files import source_files
from dream_callbacks.logging.to_jsonable import as_number, plain, spelled


class TensorBoardSink(DeferredSink):
    """Writes events for TensorBoard, on a thread of its own.

    A run that resumes hides the events after the step that it resumed at, as its steps come
    again.

    Args:
        directory: Relative to the run's directory.
        flush_s: A killed process has lost at most so many seconds.
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
        # Here and not on the thread: a process that forks while a module is half imported
        # hangs in its child.
        from torch.utils.tensorboard import SummaryWriter

        directory = run.run_dir / self.directory
        directory.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(
            str(directory),
            purge_step=run.step + 1 if any(directory.iterdir()) else None,
            flush_secs=self.flush_s,
        )
        return BackgroundSink("TensorBoard", lambda: _EventFile(writer, run))


class _EventFile(OpenedSink):
    """Runs on the thread of a BackgroundSink: what it raises is handled there."""

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
        for index, frame in enumerate(images_of(images)):
            self._add_picture(f"{name}/{index}", frame, frame.png, step)
        if captions is not None:
            self._add_text(f"{name}/captions", plain(captions), step)

    def log_videos(self, name: str, videos: Any, step: int, fps: int = 8) -> None:
        for index, frames in enumerate(videos_of(videos)):
            self._add_picture(f"{name}/{index}", frames[0], animated_png(frames, fps), step)

    def log_plot(self, name: str, figure: Any, step: int) -> None:
        picture = png_of_figure(figure)
        if picture:
            width = int.from_bytes(picture[16:20], "big")  # where a PNG has its size
            height = int.from_bytes(picture[20:24], "big")
            self._add_picture(name, Frame(width, height, 3, b""), picture, step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._add_text("config", plain(config), self._run.step)

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
        text = value if isinstance(value, str) else json.dumps(spelled(value), indent=2)
        self._writer.add_text(name, f"```\n{text}\n```", step)  # a block of code in Markdown

    def _add_picture(self, name: str, frame: Frame, encoded: bytes, step: int) -> None:
        # add_image would decode and encode again; a browser plays animated PNGs, for which
        # add_video would need moviepy.
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
