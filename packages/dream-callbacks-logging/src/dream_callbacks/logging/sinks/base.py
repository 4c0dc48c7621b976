"""What a sink is: a description that can be opened for a run, and what opening it gives."""

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
        project: First folder of the run directory.
        group: Second folder.
        experiment: Third folder.
        run_dir: Where the run writes; needn't exist yet.
        step: Optimizer steps done. Above 0, the run continues: what was logged for later steps
            by a session that crashed is about to be logged again.
    """

    project: str
    group: str
    experiment: str
    run_dir: Path
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How values are distributed.

    Args:
        counts: Values in each bin; estimates where only a part was counted.
        edges: Of the bins, one more than `counts`, evenly spaced and rising.
        total: Sum of all values.
        total_of_squares: Sum of their squares.
    """

    counts: Sequence[float]
    edges: Sequence[float]
    total: float
    total_of_squares: float


class OpenedSink:
    """Takes values until it is closed. What a sink doesn't override, it leaves out.

    No method raises for a value that the sink can't hold, nor for a disk or server that fails:
    it says so once in the log, and training goes on.
    """

    close_timeout_s: float = 10.0
    """How long `close` may take; on a background thread it is given up then."""

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers by name."""

    def log_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Take a distribution."""

    def log_images(self, name: str, images: Any, step: int, captions: Any = None) -> None:
        """Take images: `(batch, channels, height, width)`, 0 to 1 or uint8."""

    def log_videos(self, name: str, videos: Any, step: int, fps: int = 8) -> None:
        """Take videos: `(batch, time, channels, height, width)`, 0 to 1 or uint8."""

    def log_plot(self, name: str, figure: Any, step: int) -> None:
        """Take a matplotlib figure."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Take what the run was started with, as plain nested data."""

    def log_code(self, directory: Path) -> None:
        """Take the source files below a directory."""

    def flush(self) -> None:
        """Write out what is still in memory."""

    def close(self, error: BaseException | None = None) -> None:
        """Write out everything and let go.

        Args:
            error: What ended the run before its time, if anything did.
        """


class DeferredSink(ABC):
    """Where logged values go, as a description: nothing is opened until a run begins.

    The same description may be opened for several runs, one after the other, and be copied.
    """

    survives_crash = True
    """Whether a line is safe once it was logged. Beside a sink that can't say so, LoggerCallback
    writes JSON lines."""

    def check(self) -> None:  # noqa: B027  # most sinks need nothing
        """See that what `open` needs is installed; called before anything is launched.

        Raises:
            ImportError: If a library is missing.
        """

    @abstractmethod
    def open(self, run: LoggedRun) -> OpenedSink:
        """Open it for a run; called on global rank 0 alone.

        Raises:
            OSError: If nothing can be written there.
        """
