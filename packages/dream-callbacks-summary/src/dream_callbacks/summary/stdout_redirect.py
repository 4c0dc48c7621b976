"""What else is written while the bar is shown: whole lines, above it."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, cast

from rich.ansi import AnsiDecoder
from rich.text import Text


class LinesAbove:
    """Stands for a stream while a bar stands below what it writes.

    Hands on whole lines. Of a line that was written over and over, as bars of other libraries do,
    what it was in the end. All else is the stream's own.

    Args:
        stream: The terminal's stream.
        write_line: Writes a line above the bar.
    """

    def __init__(self, stream: TextIO, write_line: Callable[[Text], None]) -> None:
        self._stream = stream
        self._write_line = write_line
        self._decoder = AnsiDecoder()  # a colour may go on over several lines
        self._begun = ""
        self._is_finished = False
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._is_finished:  # somebody has kept it
            return self._stream.write(text)
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            # What a carriage return has made invisible needn't be kept until the line ends.
            self._begun = self._begun[self._begun.rstrip("\r").rfind("\r") + 1 :]
            for line in lines:
                self._write_line(self._decoder.decode_line(_visible(line)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._is_finished:  # before that, half a line has no place above the bar
            self._stream.flush()

    def finish(self) -> None:
        """Write what was begun of a line, and from now on to the stream itself."""
        with self._lock:
            self._is_finished = True
            begun, self._begun = self._begun, ""
        if begun:
            self._write_line(self._decoder.decode_line(begun))


class Redirection:
    """Leads stdout, stderr and the handlers of logging that write there to lines above a bar.

    stderr is led there only if it is a terminal, so that `2> errors.log` gets the errors.

    Args:
        write_line: As that of LinesAbove.
    """

    def __init__(self, write_line: Callable[[Text], None]) -> None:
        self._write_line = write_line
        self._originals: dict[str, TextIO] = {}
        self._standins: dict[str, LinesAbove] = {}

    def start(self) -> None:
        for name in ("stdout", "stderr"):
            stream: TextIO | None = getattr(sys, name)
            if stream is not None and stream.isatty():
                self._originals[name] = stream
                self._standins[name] = LinesAbove(stream, self._write_line)
                setattr(sys, name, cast(TextIO, self._standins[name]))
        # A handler made before writes to the stream of that time, past sys.stderr.
        self._replace_in_handlers({id(self._originals[n]): self._standins[n] for n in self._names})

    def stop(self) -> None:
        for name in self._names:
            if getattr(sys, name) is self._standins[name]:
                setattr(sys, name, self._originals[name])
        self._replace_in_handlers({id(self._standins[n]): self._originals[n] for n in self._names})
        for standin in self._standins.values():
            standin.finish()
        self._originals, self._standins = {}, {}

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(self._standins)

    def _replace_in_handlers(self, replacements: dict[int, Any]) -> None:
        for handler in _stream_handlers():
            if id(handler.stream) in replacements:
                handler.setStream(replacements[id(handler.stream)])


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        if isinstance(logger, logging.Logger):  # others hold the place of a name's parent
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler):
                    yield handler


def _visible(line: str) -> str:
    """What a terminal shows of a line in the end."""
    return line.rstrip("\r").rpartition("\r")[2] if "\r" in line else line
