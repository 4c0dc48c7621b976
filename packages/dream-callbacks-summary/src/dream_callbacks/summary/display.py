"""Where the bar is drawn: the bottom of a terminal, a notebook's output, or lines in a file."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dream_callbacks.summary.console import is_terminal, stdout_console, unless_broken
from dream_callbacks.summary.stdout_redirect import LinesAbove, Redirection

logger = logging.getLogger(__name__)


class Display:
    """Shows lines that change, and keeps lines that don't above them.

    In a terminal, or a notebook with ipywidgets, the changing lines are drawn in place, and what
    else is written to stdout, to stderr and by logging comes above. Elsewhere only the lines that
    are kept are written.

    No thread: nothing is drawn, and no lock held, but inside a call, so that workers can be forked
    at any time. The cursor is never hidden, so that nothing is to be restored after a kill. A
    stream that can't be written to any more, such as that of a terminal that was closed, ends the
    display and not the run.

    Attributes:
        is_live: Whether there are lines that change.
    """

    def __init__(self) -> None:
        self._console = stdout_console()
        self.is_live = _can_be_live(self._console)
        self._live: Live | None = None
        self._redirection = Redirection(self.keep)
        self._is_broken = False

    @property
    def width(self) -> int:
        """Columns for a line that changes."""
        return self._console.width - 1  # some terminals wrap after the last one

    @property
    def ascii_only(self) -> bool:
        """Whether bars must be drawn in ASCII."""
        return self._console.options.ascii_only

    def show(self, lines: Sequence[Text]) -> None:
        """Draw lines in place of those before; always the same number of them, on a live display.

        They must not change later: another thread that prints draws them again.
        """
        if not self._is_broken:
            with unless_broken(self._give_up):
                self._draw(Group(*lines))

    def keep(self, line: Text) -> None:
        """Write a line that stays."""
        if not self._is_broken:
            with unless_broken(self._give_up):
                self._console.print(line, soft_wrap=True)

    def close(self) -> None:
        """Leave the lines as they are and give the streams back. A second call does nothing."""
        live, self._live = self._live, None
        try:
            if live is not None and not self._is_broken:
                with unless_broken(self._give_up):
                    live.stop()
        finally:
            self._redirection.stop()

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
        if not self._console.is_jupyter:  # a notebook keeps other output apart by itself
            self._redirection.start()

    def _give_up(self, error: Exception) -> None:
        self._is_broken = True
        self._redirection.stop()
        logger.warning(
            "stdout can't be written to (%r): progress isn't shown any more, training goes on",
            error,
        )


def _can_be_live(console: Console) -> bool:
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    if isinstance(sys.stdout, LinesAbove):  # another trainer's bar is there, outside of this one
        return False
    return is_terminal(console) and console.is_interactive and not console.is_dumb_terminal
