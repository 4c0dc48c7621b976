"""Display of the bar: in place in a terminal or notebook, or as lines in a file."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dream_callbacks.summary.console import catch_write_errors, is_terminal, stdout_console
from dream_callbacks.summary.stdout_redirect import LineStream, StdoutRedirect

logger = logging.getLogger(__name__)


class Display:
    """Shows live lines, with permanent lines above them.

    In a terminal, or a notebook with ipywidgets, the live lines are redrawn in place, and other
    output to stdout, stderr and logging is printed above them. Elsewhere only permanent lines are
    written.

    Uses no thread: it draws and holds locks only inside its methods, so workers can be forked at
    any time. The cursor isn't hidden, so a killed process leaves the terminal usable. If the
    stream can't be written any more, for example because the terminal was closed, the display is
    disabled and the run continues.

    Attributes:
        is_live: Whether live lines are shown.
    """

    def __init__(self) -> None:
        self._console = stdout_console()
        self.is_live = _can_be_live(self._console)
        self._live: Live | None = None
        self._redirect = StdoutRedirect(self.write_line)
        self._is_broken = False

    @property
    def width(self) -> int:
        """Columns of a live line."""
        return self._console.width - 1  # some terminals wrap after the last one

    @property
    def ascii_only(self) -> bool:
        """Whether bars must be drawn in ASCII only."""
        return self._console.options.ascii_only

    def show(self, lines: Sequence[Text]) -> None:
        """Replace the live lines; their number must stay the same.

        The lines must not be modified later: they are redrawn when another thread prints.
        """
        if not self._is_broken:
            with catch_write_errors(self._disable):
                self._draw(Group(*lines))

    def write_line(self, line: Text) -> None:
        """Write a permanent line."""
        if not self._is_broken:
            with catch_write_errors(self._disable):
                self._console.print(line, soft_wrap=True)

    def close(self) -> None:
        """Leave the lines as they are and restore the streams. Idempotent."""
        live, self._live = self._live, None
        try:
            if live is not None and not self._is_broken:
                with catch_write_errors(self._disable):
                    live.stop()
        finally:
            self._redirect.stop()

    def _draw(self, lines: Group) -> None:
        if self._live is not None:
            self._live.update(lines, refresh=True)
            return
        self._live = Live(
            lines,
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="visible",
        )
        self._live.start(refresh=True)
        self._console.show_cursor(True)
        if not self._console.is_jupyter:  # a notebook separates other output by itself
            self._redirect.start()

    def _disable(self, error: Exception) -> None:
        self._is_broken = True
        self._redirect.stop()
        logger.warning(
            "stdout can't be written (%r): the progress display is disabled; training continues",
            error,
        )


def _can_be_live(console: Console) -> bool:
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    if isinstance(sys.stdout, LineStream):  # an outer trainer shows its bar
        return False
    return is_terminal(console) and console.is_interactive and not console.is_dumb_terminal
