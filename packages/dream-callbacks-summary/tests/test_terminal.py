"""The bar in a terminal: real runs on a pseudo-terminal, and the resulting screen."""
# ruff: noqa: T201  # prints of the user's code are tested

import contextlib
import fcntl
import logging
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dream_callbacks.summary import ModelSummary, ProgressBar, TrainerSummary
from dream_trainer.callbacks import Callback
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.trainer import BaseTrainer


class Screen:
    """A minimal terminal: text, carriage returns, moves up, erased lines, the cursor."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines = [""]
        self.row = self.column = 0
        self.is_cursor_visible = True

    def feed(self, output: str) -> None:
        for part in re.split(r"(\x1b\[[?\d;]*[A-Za-z]|[\r\n])", output):
            self._take(part)

    def _take(self, part: str) -> None:
        if part == "\r":
            self.column = 0
        elif part == "\n":
            self.row, self.column = self.row + 1, 0
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif part.startswith("\x1b["):
            self._obey(part[2:-1], part[-1])
        else:
            for character in part:
                assert character.isprintable(), f"{character!r} isn't for a terminal"
                if self.column == self.columns:
                    self._take("\n")
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1

    def _obey(self, argument: str, command: str) -> None:
        if command == "A":
            self.row -= int(argument)
        elif command == "K":
            assert argument == "2"
            self.lines[self.row] = ""
        elif (command, argument) in (("l", "?25"), ("h", "?25")):
            self.is_cursor_visible = command == "h"
        else:
            assert command == "m", f"{command} isn't expected"

    @property
    def text(self) -> list[str]:
        return [line.rstrip() for line in self.lines if line.strip()]


def in_terminal(
    function: Callable[..., Any], *args: Any, columns: int = 100, **environment: str
) -> tuple[Screen, str, Any]:
    """Call a function in a process attached to a pseudo-terminal.

    Returns:
        The final screen, all output, and the function's return value.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    chunks: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # raised when the other end is closed
            while chunk := os.read(master, 65536):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        (returned,) = run_on_ranks(
            call_at, 1, os.ttyname(slave), function.__name__, args, environment
        )
    finally:
        os.close(slave)
        reader.join()
        os.close(master)
    output = b"".join(chunks).decode()
    screen = Screen(columns)
    screen.feed(output)
    return screen, output, returned


def call_at(terminal: str, name: str, args: tuple[Any, ...], environment: dict[str, str]) -> Any:
    for variable in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        os.environ.pop(variable, None)
    os.environ.update({"TERM": "xterm-256color", **environment})
    descriptor = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    for standard in (0, 1, 2):
        os.dup2(descriptor, standard)
    encoding = environment.get("TEST_ENCODING", "utf-8")
    sys.stdout = open(1, "w", buffering=1, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding=encoding, closefd=False)  # noqa: SIM115
    return globals()[name](*args)


class SlowTrainer(TinyTrainer):
    """Slow enough for the bar to be drawn a few times."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        time.sleep(0.06)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        time.sleep(1.0)  # drawings are rarer on a busy machine
        return super().validation_step(batch, batch_idx)


def run(root_dir: str, *others: Callback[Any], **training: Any) -> None:
    SlowTrainer(tiny_config(root_dir, [*others, ProgressBar()], **training)).fit()


def without_numbers(text: list[str]) -> list[str]:
    text = [re.sub(r"[\d,.]+ (steps/s|s/step)|(\d+:)+\d\d( left)?", "", line) for line in text]
    text = [re.sub(r"[━╸─]+", "BAR", re.sub(r"\d\.\d+", "#", line)) for line in text]
    return [" ".join(line.split()) for line in text]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Screen, str]:
    """The screen after a run, and all output."""
    screen, output, _ = in_terminal(run, str(tmp_path_factory.mktemp("run")))
    return screen, output


def test_one_bar_remains_below_a_line_for_each_epoch(shown: tuple[Screen, str]):
    screen, _ = shown

    assert without_numbers(screen.text) == [
        "epoch 1/1 step 8 loss # val_loss #",
        "epoch 1/1 BAR 8/8 steps loss #",
        "validation val_loss # at step 8",
    ]


def test_the_bar_is_redrawn_in_place(shown: tuple[Screen, str]):
    seen = [int(n) for n in re.findall(r"(\d)/8 steps", shown[1])]

    assert seen == sorted(seen)
    assert len(set(seen)) >= 3
    assert len(seen) <= 20


def test_validation_has_its_own_bar(shown: tuple[Screen, str]):
    assert re.search(r"validation.*━.*1/2 batches", shown[1])


def test_every_drawing_has_the_same_number_of_lines(shown: tuple[Screen, str]):
    # Forked processes would draw an old state.
    moves = re.findall(r"\r\x1b\[2K((?:\x1b\[1A\x1b\[2K)*)", shown[1])

    assert len(moves) > 5
    assert len(set(moves)) == 1


def test_the_cursor_is_visible_between_drawings(shown: tuple[Screen, str]):
    # A killed process then leaves the terminal usable.
    output = shown[1]

    assert output.count("\x1b[?25l") == 1  # rich hides it once at the start
    assert output.index("\x1b[?25l") < output.index("\x1b[?25h") < output.index("1/8 steps")


@pytest.mark.parametrize("columns", [12, 40, 80])
def test_the_bar_fits_any_width(tmp_path: Path, columns: int):
    screen, output, _ = in_terminal(run, str(tmp_path), columns=columns)

    # A wrapped line would remain above the next drawing.
    assert output.count("\r\x1b[2K") >= 5
    assert len(screen.text) == 3


def evaluate(root_dir: str) -> None:
    trainer = SlowTrainer(tiny_config(root_dir, [ProgressBar()]))
    trainer.setup()
    trainer.validate()
    trainer.predict(trainer.val_dataloader)
    print("after")


def test_an_evaluation_has_a_bar_and_leaves_a_line(tmp_path: Path):
    screen, output, _ = in_terminal(evaluate, str(tmp_path))

    assert without_numbers(screen.text) == [
        "validation 2 batches val_loss # at step 0",
        "predict 2 batches",
        "after",
    ]
    assert re.search(r"validation.*━.*1/2 batches", output)
    assert "epoch" not in output


class Talker(Callback[BaseTrainer]):
    """Writes to stdout, stderr, logging and warnings."""

    def __init__(self) -> None:
        self.handler = logging.StreamHandler()  # holds the current stderr
        logging.getLogger("talker").addHandler(self.handler)

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if batch_idx == 3:
            print("a print", "in one line")
            print("half a ", end="", flush=True)
            print("line")
            sys.stdout.write("two\nlines\n")
            print("a long line " + "0123456789" * 12)
            logging.getLogger("talker").warning("a logged warning")
            warnings.warn("a warning", stacklevel=1)
            for percent in range(0, 101, 10):
                print(f"\rdownload {percent}%", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
            print("\x1b[31mred\x1b[0m")


def talk(root_dir: str) -> tuple[bool, bool]:
    warnings.simplefilter("always")
    stdout, stderr, talker = sys.stdout, sys.stderr, Talker()
    run(root_dir, talker)
    return sys.stdout is stdout and sys.stderr is stderr, talker.handler.stream is stderr


def test_other_output_is_printed_above_the_bar_unchanged(tmp_path: Path):
    screen, output, _ = in_terminal(talk, str(tmp_path))
    text = screen.text
    start = text.index("a print in one line")

    assert text[start : start + 4] == ["a print in one line", "half a line", "two", "lines"]
    assert "".join(text[start + 4 : start + 6]) == "a long line " + "0123456789" * 12
    assert text[start + 6] == "a logged warning"
    assert "UserWarning: a warning" in text[start + 7]
    assert text[start + 9 : start + 11] == ["download 100%", "red"]
    assert re.search(r"\x1b\[31mred", output)
    assert without_numbers(text[start + 11 :]) == [
        "epoch 1/1 step 8 loss # val_loss #",
        "epoch 1/1 BAR 8/8 steps loss #",
        "validation val_loss # at step 8",
    ]


def test_streams_and_handlers_are_restored(tmp_path: Path):
    _, _, (streams_are_back, handler_is_back) = in_terminal(talk, str(tmp_path))

    assert streams_are_back
    assert handler_is_back


def test_output_of_forked_workers_is_printed_above_the_bar(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import time, torch
from dream_callbacks.summary import ProgressBar
from dream_trainer.testing import TinyTrainer, tiny_config
from torch.utils.data import DataLoader

class Loud:
    def __len__(self):
        return 8
    def __getitem__(self, index):
        if index == 5:
            print("from a worker")
        return torch.zeros(4), torch.zeros(1)

class LoudTrainer(TinyTrainer):
    def configure_dataloaders(self):
        workers = dict(num_workers=1, prefetch_factor=1, multiprocessing_context="fork")
        return DataLoader(Loud(), **workers), super().configure_dataloaders()[1]
    def training_step(self, batch, batch_idx):
        time.sleep(0.15)
        return super().training_step(batch, batch_idx)

LoudTrainer(tiny_config({str(tmp_path)!r}, [ProgressBar()])).fit()
"""
    )
    process, master = start(script)
    screen = Screen(100)
    screen.feed(read_until(master, None).decode())
    os.close(master)
    os.waitpid(process, 0)

    assert without_numbers(screen.text) == [
        "from a worker",
        "epoch 1/1 step 8 loss # val_loss #",
        "epoch 1/1 BAR 8/8 steps loss #",
        "validation val_loss # at step 8",
    ]


def fit_inside(root_dir: str) -> None:
    class Inner(Callback[BaseTrainer]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if batch_idx == 3:
                TinyTrainer(tiny_config(f"{root_dir}/inner", [ProgressBar()])).fit()

    run(root_dir, Inner())


def test_a_nested_run_writes_lines_above_the_bar(tmp_path: Path):
    screen, _, _ = in_terminal(fit_inside, str(tmp_path))

    assert without_numbers(screen.text) == [
        "epoch 1/1 step 8 loss #",
        "epoch 1/1 step 8 val_loss #",
        "epoch 1/1 step 8 loss # val_loss #",
        "epoch 1/1 BAR 8/8 steps loss #",
        "validation val_loss # at step 8",
    ]


def fail(root_dir: str) -> bool:
    class Failing(Callback[BaseTrainer]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if batch_idx == 4:
                raise ValueError("a bad batch")

    stdout = sys.stdout
    with contextlib.suppress(ValueError):
        run(root_dir, Failing())
    print("after")
    return sys.stdout is stdout


def test_an_error_restores_the_terminal(tmp_path: Path):
    screen, _, is_back = in_terminal(fail, str(tmp_path))

    assert is_back
    assert screen.is_cursor_visible
    assert without_numbers(screen.text) == [
        "epoch 1/1 BAR 5/8 steps loss #",
        "failed at step 5: ValueError: a bad batch",
        "after",
    ]


def fail_in_anothers_pre_fit(root_dir: str) -> bool:
    class Failing(Callback[BaseTrainer]):
        after = {ProgressBar}

        def pre_fit(self) -> None:
            raise ValueError("not ready")

    stdout = sys.stdout
    with contextlib.suppress(ValueError):
        run(root_dir, Failing())
    return sys.stdout is stdout


def test_an_error_in_another_pre_fit_restores_the_terminal(tmp_path: Path):
    screen, _, is_back = in_terminal(fail_in_anothers_pre_fit, str(tmp_path))

    assert is_back
    assert screen.is_cursor_visible
    assert screen.text[-1] == "failed at step 0: ValueError: not ready"


def interrupt_the_first_drawing(root_dir: str) -> bool:
    class Interrupting:
        """Ctrl-C while the bar is being written."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream
            self.is_pending = True

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

        def write(self, text: str) -> int:
            if "steps" in text and self.is_pending:
                self.is_pending = False
                raise KeyboardInterrupt
            return int(self.stream.write(text))

    interrupting: Any = Interrupting(sys.stdout)
    sys.stdout = interrupting
    with contextlib.suppress(KeyboardInterrupt):
        run(root_dir)
    return sys.stdout is interrupting


def test_ctrl_c_during_the_first_drawing_restores_the_terminal(tmp_path: Path):
    screen, output, is_back = in_terminal(interrupt_the_first_drawing, str(tmp_path))

    assert is_back
    assert screen.is_cursor_visible
    assert "1/8 steps" not in output


def fit_twice(root_dir: str) -> None:
    config = tiny_config(root_dir, [ProgressBar()])
    trainer = SlowTrainer(config)
    trainer.fit()
    trainer.training_parameters.n_epochs = 2
    print("again")
    trainer.fit()


def test_a_second_fit_has_its_own_bar(tmp_path: Path):
    screen, _, _ = in_terminal(fit_twice, str(tmp_path))

    assert without_numbers(screen.text) == [
        "epoch 1/1 step 8 loss # val_loss #",
        "epoch 1/1 BAR 8/8 steps loss #",
        "validation val_loss # at step 8",
        "again",
        "epoch 2/2 step 16 loss # val_loss #",
        "epoch 2/2 BAR 8/8 steps loss #",
        "validation val_loss # at step 16",
    ]


def run_fast_epochs(root_dir: str) -> None:
    TinyTrainer(tiny_config(root_dir, [ProgressBar()], n_epochs=60)).fit()


def test_fast_epochs_write_a_few_lines_and_the_last_one(tmp_path: Path):
    screen, _, _ = in_terminal(run_fast_epochs, str(tmp_path))
    kept = [line for line in screen.text if " step " in line and line.startswith("epoch")]

    assert kept[0].startswith("epoch 1/60")
    assert kept[-1].startswith("epoch 60/60")
    minutes, seconds = map(int, kept[-1].split()[-1].split(":"))
    assert len(kept) <= 5 + 60 * minutes + seconds + 2


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_without_cursor_movement_shows_lines(tmp_path: Path, term: str):
    screen, output, _ = in_terminal(run, str(tmp_path), TERM=term)

    assert "\x1b" not in output
    assert without_numbers(screen.text) == [
        "epoch 1/1 step 8 loss #",
        "epoch 1/1 step 8 val_loss #",
    ]


def summarize(root_dir: str) -> None:
    callbacks = [TrainerSummary(), ModelSummary(), ProgressBar()]
    SlowTrainer(tiny_config(root_dir, callbacks)).fit()


def test_a_terminal_without_unicode_shows_ascii(tmp_path: Path):
    _, output, _ = in_terminal(summarize, str(tmp_path), TEST_ENCODING="ascii")

    assert "====" in output
    assert "━" not in output
    assert "blocks.0-1 (2 ?)" in output


def test_a_closed_terminal_disables_the_bar_but_not_the_run(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib, signal, time\n"
        "from dream_callbacks.summary import ProgressBar\n"
        "from dream_trainer.testing import TinyTrainer, tiny_config\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "class Slow(TinyTrainer):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        time.sleep(0.1)\n"
        "        return super().training_step(batch, batch_idx)\n"
        f"Slow(tiny_config({str(tmp_path)!r}, [ProgressBar()])).fit()\n"
        f"pathlib.Path({str(tmp_path)!r}, 'done').touch()\n"
    )
    process, master = start(script)
    read_until(master, b"1/8 steps")
    os.close(master)
    _, status = os.waitpid(process, 0)

    assert (tmp_path / "done").exists()
    assert os.waitstatus_to_exitcode(status) in (0, 120)  # 120: Python could not flush its streams


def test_ctrl_c_ends_the_run_and_restores_the_terminal(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(
        "import time\n"
        "from dream_callbacks.summary import ProgressBar\n"
        "from dream_trainer.entrypoint import entrypoint\n"
        "from dream_trainer.testing import TinyTrainer, tiny_config\n"
        "class Slow(TinyTrainer):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        time.sleep(0.1)\n"
        "        return super().training_step(batch, batch_idx)\n"
        "@entrypoint\n"
        "def main():\n"
        f"    Slow(tiny_config({str(tmp_path)!r}, [ProgressBar()], n_epochs=9)).fit()\n"
        "main()\n"
    )
    process, master = start(script)
    output = read_until(master, b"1/8 steps")
    os.write(master, b"\x03")
    output += read_until(master, None)
    os.close(master)
    _, status = os.waitpid(process, 0)
    screen = Screen(100)
    screen.feed(output.decode())

    assert os.waitstatus_to_exitcode(status) == 130
    assert screen.is_cursor_visible
    assert re.fullmatch(r"stopped at step \d+: SIGINT", screen.text[-2])
    assert screen.text[-1] == "interrupted"
    assert sum("/8 steps" in line for line in screen.text) == 1


def start(script: Path) -> tuple[int, int]:
    """Start a script in its own pseudo-terminal.

    Returns:
        Process id and master end of the terminal.
    """
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    process, master = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, str(script)], environment)
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    return process, master


def read_until(master: int, expected: bytes | None) -> bytes:
    """Read until `expected` is in the output; with None, until the end."""
    output = b""
    signal.alarm(60)
    try:
        while expected is None or expected not in output:
            output += os.read(master, 65536)
    except OSError:
        assert expected is None, output.decode()
    finally:
        signal.alarm(0)
    return output
