"""Base classes of sinks: a deferred sink, and the opened sink that it returns for a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """The run that a sink is opened for.

    Args:
        project: First component of the run directory.
        group: Second component.
        experiment: Third component.
        run_dir: Run directory; may not exist yet.
        step: Completed optimizer steps. Above 0, the run is resumed: values that a crashed
            session logged for later steps will be logged again.
        is_evaluation: Whether it is opened for `validate` or `test`: nothing is logged again.
    """

    project: str
    group: str
    experiment: str
    run_dir: Path
    step: int = 0
    is_evaluation: bool = False


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Histogram of the values of a tensor.

    Args:
        counts: Number of values in each bin; an estimate if the tensor was subsampled.
        edges: Edges of the bins, one more than `counts`, evenly spaced and ascending.
        total: Sum of all values.
        total_of_squares: Sum of the squares of all values.
    """

    counts: Sequence[float]
    edges: Sequence[float]
    total: float
    total_of_squares: float


class OpenedSink:
    """Receives values until it is closed. Methods that aren't overridden discard their values.

    No method raises for a value that the sink can't store, or for a disk or server that fails:
    it logs one warning and training continues.
    """

    close_timeout_s: float = 10.0
    """Time limit of `close` on a background thread, in seconds."""

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by name."""

    def log_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Log a histogram."""

    def log_images(self, name: str, images: Any, step: int, captions: Any = None) -> None:
        """Log images: `(batch, channels, height, width)`, 0 to 1 or uint8."""

    def log_videos(self, name: str, videos: Any, step: int, fps: int = 8) -> None:
        """Log videos: `(batch, time, channels, height, width)`, 0 to 1 or uint8."""

    def log_plot(self, name: str, figure: Any, step: int) -> None:
        """Log a matplotlib figure."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log the config of the run, as nested data."""

    def log_code(self, directory: Path) -> None:
        """Log the source files below a directory."""

    def flush(self) -> None:
        """Write buffered values."""

    def close(self, error: BaseException | None = None) -> None:
        """Write buffered values and release all resources.

        Args:
            error: The exception that ended the run, if any.
        """


class DeferredSink(ABC):
    """Options of a sink, which is opened when a run begins.

    Can be copied, and opened for several runs one after the other.
    """

    survives_crash = True
    """Whether logged values survive a crash. If no sink guarantees it, LoggerCallback adds JSON
    lines."""

    def check(self) -> None:  # noqa: B027  # most sinks need no library
        """Check that the libraries that `open` needs are installed; called before launch.

        Raises:
            ImportError: If a library is missing.
        """

    @abstractmethod
    def open(self, run: LoggedRun) -> OpenedSink:
        """Open the sink for a run; called on global rank 0 only.

        Raises:
            OSError: If it can't be written.
        """
