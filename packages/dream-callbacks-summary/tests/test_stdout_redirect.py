import io
import logging
import sys
from typing import Any

import pytest
from rich.text import Text

from dream_callbacks.summary.stdout_redirect import LineStream, StdoutRedirect


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def lines_of(*writes: str) -> list[str]:
    lines: list[Text] = []
    stream: Any = LineStream(Terminal(), lines.append)
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
def test_whole_lines_are_passed_on_in_their_final_state(writes: list[str], expected: list[str]):
    assert lines_of(*writes) == expected


def test_write_returns_the_number_of_characters():
    stream: Any = LineStream(Terminal(), lambda line: None)

    assert stream.write("four\nfive") == 9


def test_colors_are_kept_and_cursor_movements_are_dropped():
    lines: list[Text] = []
    stream: Any = LineStream(Terminal(), lines.append)
    stream.write("\x1b[2K\x1b[1A\x1b[31mred\nstill red\x1b[0m\n")

    assert [line.plain for line in lines] == ["red", "still red"]
    assert [line.markup for line in lines] == [
        "[color(1)]red[/color(1)]",
        "[color(1)]still red[/color(1)]",
    ]


def test_other_attributes_are_those_of_the_stream():
    stream: Any = LineStream(Terminal(), lambda line: None)

    assert stream.isatty()
    assert stream.encoding == "utf-8"
    assert not stream.closed


def test_a_kept_reference_writes_to_the_stream_afterwards():
    terminal = Terminal()
    stream: Any = LineStream(terminal, lambda line: None)
    stream.finish()
    stream.writelines(["a", "b"])

    assert terminal.getvalue() == "ab"


def test_streams_that_are_not_terminals_are_not_redirected(monkeypatch: pytest.MonkeyPatch):
    out, err = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    redirect = StdoutRedirect(lambda line: None)
    redirect.start()
    during = sys.stdout, sys.stderr
    redirect.stop()

    assert isinstance(during[0], LineStream)
    assert during[1] is err
    assert sys.stdout is out


def test_a_stream_replaced_during_redirection_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    redirect = StdoutRedirect(lambda line: None)
    redirect.start()
    replacement = io.StringIO()
    monkeypatch.setattr(sys, "stdout", replacement)
    redirect.stop()

    assert sys.stdout is replacement


def test_a_handler_made_during_redirection_writes_to_the_stream_afterwards(
    monkeypatch: pytest.MonkeyPatch,
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    redirect = StdoutRedirect(lambda line: None)
    redirect.start()
    handler = logging.StreamHandler()
    logger = logging.getLogger("test_streams")
    logger.addHandler(handler)
    redirect.stop()
    logger.warning("afterwards")
    logger.removeHandler(handler)

    assert terminal.getvalue() == "afterwards\n"
