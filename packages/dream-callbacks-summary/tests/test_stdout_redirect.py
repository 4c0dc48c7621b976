import io
import logging
import sys
from typing import Any

import pytest
from rich.text import Text

from dream_callbacks.summary.stdout_redirect import LinesAbove, Redirection


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def lines_of(*writes: str) -> list[str]:
    lines: list[Text] = []
    stream: Any = LinesAbove(Terminal(), lines.append)
    for text in writes:
        stream.write(text)
        stream.flush()
    stream.finish()
    return [line.plain for line in lines]


@pytest.mark.parametrize(
    ("writes", "expected"),
    [
        (["a\n"], ["a"]),
        (["a", "b\nc", "\n"], ["ab", "c"]),
        (["\n\n"], ["", ""]),
        (["a\r\nb\r\n"], ["a", "b"]),
        (["1%\r2%\r3%\n"], ["3%"]),
        (["\r1%", "\r2%", "\r3%", "\n"], ["3%"]),
        (["1%\r", "2%\r", "\n"], ["2%"]),
        (["no end"], ["no end"]),
        ([""], []),
    ],
    ids=repr,
)
def test_whole_lines_are_handed_on_as_they_were_in_the_end(writes: list[str], expected: list[str]):
    assert lines_of(*writes) == expected


def test_a_write_returns_what_it_took():
    stream: Any = LinesAbove(Terminal(), lambda line: None)

    assert stream.write("four\nfive") == 9


def test_colours_are_kept_and_cursor_movements_are_not():
    lines: list[Text] = []
    stream: Any = LinesAbove(Terminal(), lines.append)
    stream.write("\x1b[2K\x1b[1A\x1b[31mred\nstill red\x1b[0m\n")

    assert [line.plain for line in lines] == ["red", "still red"]
    assert [line.markup for line in lines] == [
        "[color(1)]red[/color(1)]",
        "[color(1)]still red[/color(1)]",
    ]


def test_all_else_is_the_streams_own():
    stream: Any = LinesAbove(Terminal(), lambda line: None)

    assert stream.isatty()
    assert stream.encoding == "utf-8"
    assert not stream.closed


def test_whoever_keeps_it_writes_to_the_stream_afterwards():
    terminal = Terminal()
    stream: Any = LinesAbove(terminal, lambda line: None)
    stream.finish()
    stream.writelines(["a", "b"])

    assert terminal.getvalue() == "ab"


def test_streams_that_are_no_terminal_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    out, err = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    redirection = Redirection(lambda line: None)
    redirection.start()
    during = sys.stdout, sys.stderr
    redirection.stop()

    assert isinstance(during[0], LinesAbove)
    assert during[1] is err
    assert sys.stdout is out


def test_a_stream_that_was_replaced_meanwhile_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    redirection = Redirection(lambda line: None)
    redirection.start()
    replacement = io.StringIO()
    monkeypatch.setattr(sys, "stdout", replacement)
    redirection.stop()

    assert sys.stdout is replacement


def test_a_handler_made_meanwhile_writes_to_the_stream_afterwards(
    monkeypatch: pytest.MonkeyPatch,
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    redirection = Redirection(lambda line: None)
    redirection.start()
    handler = logging.StreamHandler()
    logger = logging.getLogger("test_streams")
    logger.addHandler(handler)
    redirection.stop()
    logger.warning("afterwards")
    logger.removeHandler(handler)

    assert terminal.getvalue() == "afterwards\n"
