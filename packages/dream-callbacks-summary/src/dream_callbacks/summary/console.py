"""The console on stdout: a terminal, a notebook or a file, which may break at any time."""

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
    """A console on what stdout is now; it takes text as it is."""
    file = cast(TextIO, _Lossy(sys.stdout))
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not is_terminal(console) and not console.is_jupyter:
        # Not 80 columns, nor COLUMNS, which a parent process with readline exports unasked.
        console.width = _FILE_WIDTH
    return console


def is_terminal(console: Console) -> bool:
    """Whether somebody sees it, at its width; FORCE_COLOR makes rich take a pipe for that."""
    isatty = getattr(console.file, "isatty", None)
    return isatty is not None and isatty()


def write(what: RenderableType) -> None:
    """Write a table or a text to stdout; if that isn't possible, warn and go on."""
    with unless_broken(_warn):
        stdout_console().print(what)


@contextmanager
def unless_broken(give_up: Callable[[Exception], None]) -> Iterator[None]:
    """Keep the errors of a stream that can't be written to from ending the run.

    Args:
        give_up: Called with the error.
    """
    try:
        yield
    except OSError as error:
        give_up(error)
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        give_up(error.__context__)  # rich makes one of the other


class _Lossy:
    """Stands for a stream and writes "?" for characters that its encoding lacks."""

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
    logger.warning("stdout can't be written to (%r); training goes on", error)
