"""JSONLinesSink: one line of JSON per call, in the page cache when the call returns.

Lines with numbers::

    {"step": 40, "time": 1767225600.25, "train/loss": 2.31, "epoch": 0.5}

All others have an "event": "start" (a new session, which supersedes earlier lines for later
steps), "evaluation" (a session that supersedes none), "config", "code", "images", "videos", "plot",
"histogram", "end". Images are PNG files next to the log. NaN and infinities are the strings "NaN",
"Infinity", "-Infinity", since JSON has no numbers for them: every JSON parser reads the line, and
float() parses the string.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dream_callbacks.logging.frames import figure_png, image_frames, video_frames
from dream_callbacks.logging.history import LOG_NAME, START
from dream_callbacks.logging.png import animated_png
from dream_callbacks.logging.sinks.base import DeferredSink, Histogram, LoggedRun, OpenedSink
from dream_callbacks.logging.source_files import short_digest, source_files
from dream_callbacks.logging.to_jsonable import as_number, encode_non_finite, to_jsonable

logger = logging.getLogger(__name__)

_RESERVED = frozenset({"step", "time", "event"})


class JSONLinesSink(DeferredSink):
    """Appends to a file of JSON lines; `read_jsonl` reads it back.

    Each line is one system call, so a killed process loses none. Images, and a zip of the code if
    it is logged, are stored next to the file.

    Args:
        path: Path relative to the run directory.
    """

    def __init__(self, path: str | os.PathLike[str] = LOG_NAME) -> None:
        self.path = Path(path)

    def open(self, run: LoggedRun) -> OpenedSink:
        return _JSONLinesFile(run.run_dir / self.path, run)


class _JSONLinesFile(OpenedSink):
    def __init__(self, path: Path, run: LoggedRun) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._run_dir = run.run_dir
        self._pid = os.getpid()
        self._step = run.step
        self._num_lost = 0
        self._file: int | None = os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
        )
        # A line truncated by a full disk or a power failure must not swallow the next one.
        self._is_cut_off = _ends_inside_line(path)
        self._write(
            {
                "event": "evaluation" if run.is_evaluation else START,
                "project": run.project,
                "group": run.group,
                "experiment": run.experiment,
                "host": platform.node(),
                "pid": self._pid,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            run.step,
        )

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        line: dict[str, Any] = {}
        for name, value in values.items():
            number = as_number(value)
            key = str(name)
            line[f"{key}_" if key in _RESERVED else key] = (
                to_jsonable(value) if number is None else number
            )
        self._write(line, step)

    def log_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        line = {
            "event": "histogram",
            "name": name,
            "low": histogram.edges[0],
            "high": histogram.edges[-1],
            "counts": [round(count) for count in histogram.counts],
        }
        self._write(line, step)

    def log_images(self, name: str, images: Any, step: int, captions: Any = None) -> None:
        if os.getpid() == self._pid:
            files = [frame.png for frame in image_frames(images)]
            more = {} if captions is None else {"captions": to_jsonable(captions)}
            self._write_files("images", name, files, step, more)

    def log_videos(self, name: str, videos: Any, step: int, fps: int = 8) -> None:
        if os.getpid() == self._pid:
            files = [animated_png(frames, fps) for frames in video_frames(videos)]
            self._write_files("videos", name, files, step, {"fps": fps})

    def log_plot(self, name: str, figure: Any, step: int) -> None:
        if os.getpid() == self._pid:
            picture = figure_png(figure)
            self._write_files("plot", name, [picture] if picture else [], step, {})

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._write({"event": "config", "config": to_jsonable(config)}, self._step)

    def log_code(self, directory: Path) -> None:
        if os.getpid() != self._pid:
            return
        sources = source_files(directory, leave_out=self._run_dir)
        content = sources.archive()
        archive = self._path.parent / "code" / f"{short_digest(content)}.zip"
        if archive.exists() or self._save(archive, content):
            line = {
                "event": "code",
                "directory": str(directory),
                "archive": archive.relative_to(self._path.parent).as_posix(),
                "num_files": len(sources.paths),
                "too_large": list(sources.too_large),
            }
            self._write(line, self._step)

    def close(self, error: BaseException | None = None) -> None:
        if self._file is None or os.getpid() != self._pid:
            return
        text = None if error is None else f"{type(error).__name__}: {error}"
        self._write({"event": "end", "error": to_jsonable(text)}, self._step)
        os.close(self._file)
        self._file = None

    def _write_files(
        self, kind: str, name: str, files: Sequence[bytes], step: int, more: Mapping[str, Any]
    ) -> None:
        folder = self._path.parent / "media" / _safe_name(name)
        paths = [folder / f"{step:08}-{index}.png" for index in range(len(files))]
        saved = [path for path, data in zip(paths, files, strict=True) if self._save(path, data)]
        if saved:
            names = [path.relative_to(self._path.parent).as_posix() for path in saved]
            self._write({"event": kind, "name": name, "files": names, **more}, step)

    def _save(self, path: Path, content: bytes) -> bool:
        temporary = path.with_name(f".{path.name}.{self._pid}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            self._lost(error)
            return False
        return True

    def _write(self, line: Mapping[str, Any], step: int) -> None:
        """Append a line; never raises for its content or a disk error."""
        if self._file is None or os.getpid() != self._pid:
            return  # closed, or a forked loader worker
        self._step = step = as_number(step) or 0  # type: ignore[assignment]  # an integer
        head = {"step": step, "time": round(time.time(), 3)}
        try:
            text = json.dumps({**head, **line}, allow_nan=False)
        except (ValueError, TypeError):
            # Rare: letting json fail is faster than checking each value.
            text = json.dumps(encode_non_finite(to_jsonable({**head, **line})))
        data = f"\n{text}\n".encode() if self._is_cut_off else f"{text}\n".encode()
        try:
            num_written = os.write(self._file, data)
        except OSError as error:
            self._lost(error)
            return
        self._is_cut_off = num_written < len(data)
        if self._is_cut_off:
            self._lost(OSError(f"{num_written} of {len(data)} bytes written; is the disk full?"))

    def _lost(self, error: OSError) -> None:
        self._num_lost += 1
        if self._num_lost == 1:
            logger.warning(
                "%s can't be written: %s; training continues, and later lines are still tried",
                self._path,
                error,
            )


def _ends_inside_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _safe_name(name: str) -> str:
    """A safe relative path for a name; slashes separate directories."""
    parts = [re.sub(r"[^\w.-]", "_", part).strip(".") for part in str(name).split("/")]
    return "/".join(part[:100] for part in parts if part) or "unnamed"
