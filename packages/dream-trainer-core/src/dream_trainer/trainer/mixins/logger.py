"""LoggerMixin: `trainer.log_*`, which send values to all sinks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dream_trainer.interface.trainer import AbstractTrainer
from dream_trainer.numbers import as_float, is_readable_alone


class Sink(Protocol):
    """Destination of logged values: a file, TensorBoard, an experiment tracker.

    A sink skips values that it doesn't support; it must not raise.
    """

    def log_scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def log_images(self, name: str, images: Any, step: int, captions: Any = None) -> None: ...

    def log_videos(self, name: str, videos: Any, step: int, fps: int = 8) -> None: ...

    def log_plot(self, name: str, figure: Any, step: int) -> None: ...

    def log_config(self, config: Mapping[str, Any]) -> None: ...

    def log_code(self, directory: Path) -> None: ...

    def close(self) -> None: ...


class LoggerMixin(AbstractTrainer):
    """Sends logged values to its sinks; has none until a callback adds some.

    Sinks are added on global rank 0 only, so logging does nothing on the other ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sinks: list[Sink] = []

    @property
    def sinks(self) -> tuple[Sink, ...]:
        return tuple(self._sinks)

    def add_sink(self, sink: Sink) -> None:
        """Send values logged from now on to `sink` too."""
        self._sinks.append(sink)

    def remove_sink(self, sink: Sink) -> None:
        """Stop sending values to `sink`; the caller closes it."""
        self._sinks.remove(sink)

    def log_scalar(self, name: str, value: float | Tensor, step: int | None = None) -> None:
        """Log a number; a device sync if it is a tensor.

        Args:
            name: Slashes make groups: "val/loss".
            value: Any number, such as a tensor with one element.
            step: Default: `global_step`.

        Raises:
            TypeError: If `value` isn't a number.
        """
        self.log_dict({name: value}, step)

    def log_dict(self, values: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Log several numbers at once; a device sync if there are tensors.

        Raises:
            TypeError: If a value isn't a number.
        """
        if self._sinks:
            numbers = {name: _as_float(name, value) for name, value in values.items()}
            for sink in self._sinks:
                sink.log_scalars(numbers, self._step(step))

    def log_images(
        self, name: str, images: Any, step: int | None = None, captions: Any = None
    ) -> None:
        """Log images: `(batch, channels, height, width)`, 0 to 1 or uint8."""
        for sink in self._sinks:
            sink.log_images(name, images, self._step(step), captions)

    def log_videos(self, name: str, videos: Any, step: int | None = None, fps: int = 8) -> None:
        """Log videos: `(batch, time, channels, height, width)`, 0 to 1 or uint8."""
        for sink in self._sinks:
            sink.log_videos(name, videos, self._step(step), fps)

    def log_plot(self, name: str, figure: Any, step: int | None = None) -> None:
        """Log a matplotlib figure."""
        for sink in self._sinks:
            sink.log_plot(name, figure, self._step(step))

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log the config of the run."""
        for sink in self._sinks:
            sink.log_config(config)

    def log_code(self, directory: str | Path) -> None:
        """Log the source files below a directory."""
        for sink in self._sinks:
            sink.log_code(Path(directory))

    def _step(self, step: int | None) -> int:
        return self.global_step if step is None else step


def _as_float(name: str, value: Any) -> float:
    number = as_float(value) if is_readable_alone(value) else None
    if number is None:
        raise TypeError(
            f"{name!r} can't be logged as a scalar: it is a {type(value).__qualname__}, and one "
            "number that this rank can read is required, such as a tensor's .mean()"
        )
    return number
