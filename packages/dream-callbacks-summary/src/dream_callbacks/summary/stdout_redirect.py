"""Redirection of other output while the bar is shown: whole lines, above the bar."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, cast

from rich.ansi import AnsiDecoder
from rich.text import Text


class LineStream:
    """Replaces a terminal stream while the bar is shown.

    Passes on whole lines. A line that was overwritten with carriage returns, as by progress bars
    of other libraries, is passed on in its final state. Other attributes are those of the stream.

    Args:
        stream: The terminal's stream.
        write_line: Writes a line above the bar.
    """

    def __init__(self, stream: TextIO, write_line: Callable[[Text], None]) -> None:
        self._stream = stream
        self._write_line = write_line
        self._decoder = AnsiDecoder()  # a color may span several lines
        self._partial_line = ""
        self._is_closed = False
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._is_closed:  # a reference was kept
            return self._stream.write(text)
        with self._lock:
            *lines, self._partial_line = (self._partial_line + text).split("\n")
            # Drop text that a carriage return has overwritten.
            self._partial_line = self._partial_line[
                self._partial_line.rstrip("\r").rfind("\r") + 1 :
            ]
            for line in lines:
                self._write_line(self._decoder.decode_line(_visible(line)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._is_closed:  # before that, partial lines stay buffered
            self._stream.flush()

    def finish(self) -> None:
        """Write the partial line; later writes go to the stream itself."""
        with self._lock:
            self._is_closed = True
            partial_line, self._partial_line = self._partial_line, ""
        if partial_line:
            self._write_line(self._decoder.decode_line(partial_line))


class StdoutRedirect:
    """Redirects stdout, stderr and logging handlers that write to them to lines above a bar.

    Only terminals are redirected, so `2> errors.log` still gets the errors.

    Args:
        write_line: `write_line` of LineStream.
    """

    def __init__(self, write_line: Callable[[Text], None]) -> None:
        self._write_line = write_line
        self._originals: dict[str, TextIO] = {}
        self._replacements: dict[str, LineStream] = {}

    def start(self) -> None:
        for name in ("stdout", "stderr"):
            stream: TextIO | None = getattr(sys, name)
            if stream is not None and stream.isatty():
                self._originals[name] = stream
                self._replacements[name] = LineStream(stream, self._write_line)
                setattr(sys, name, cast(TextIO, self._replacements[name]))
        # Existing handlers hold the original stream, not sys.stderr.
        self._replace_in_handlers(
            {id(self._originals[n]): self._replacements[n] for n in self._names}
        )

    def stop(self) -> None:
        for name in self._names:
            if getattr(sys, name) is self._replacements[name]:
                setattr(sys, name, self._originals[name])
        self._replace_in_handlers(
            {id(self._replacements[n]): self._originals[n] for n in self._names}
        )
        for replacement in self._replacements.values():
            replacement.finish()
        self._originals, self._replacements = {}, {}

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(self._replacements)

    def _replace_in_handlers(self, replacements: dict[int, Any]) -> None:
        for handler in _stream_handlers():
            if id(handler.stream) in replacements:
                handler.setStream(replacements[id(handler.stream)])


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        if isinstance(logger, logging.Logger):  # the others are placeholders
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler):
                    yield handler


def _visible(line: str) -> str:
    """The text of a line that remains visible in a terminal."""
    return line.rstrip("\r").rpartition("\r")[2] if "\r" in line else line
