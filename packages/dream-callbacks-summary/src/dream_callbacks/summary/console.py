"""Rich consoles on stdout, and handling of write errors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console, RenderableType

logger = logging.getLogger(__name__)

_FILE_WIDTH = 160


def stdout_console() -> Console:
    """A console on the current stdout, without markup or highlighting."""
    file = cast(TextIO, _LossyStream(sys.stdout))
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not is_terminal(console) and not console.is_jupyter:
        # Not 80 columns, nor COLUMNS, which parent processes with readline export.
        console.width = _FILE_WIDTH
    return console


def is_terminal(console: Console) -> bool:
    """Whether stdout is a terminal; with FORCE_COLOR, rich itself treats a pipe as one."""
    isatty = getattr(console.file, "isatty", None)
    return isatty is not None and isatty()


def write(what: RenderableType) -> None:
    """Write a table or text to stdout; a write error only warns."""
    with catch_write_errors(_warn):
        stdout_console().print(what)


@contextmanager
def catch_write_errors(on_error: Callable[[Exception], None]) -> Iterator[None]:
    """Catch the errors of a stream that can't be written.

    Args:
        on_error: Called with the error.
    """
    try:
        yield
    except OSError as error:
        on_error(error)
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        on_error(error.__context__)  # rich raises SystemExit for BrokenPipeError


class _LossyStream:
    """Wraps a stream; writes "?" for characters that its encoding lacks."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:
            return self._stream.write(text.encode(error.encoding, "replace").decode(error.encoding))


def _warn(error: Exception) -> None:
    logger.warning("stdout can't be written (%r); training continues", error)
