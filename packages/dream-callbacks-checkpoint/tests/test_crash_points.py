"""A crash or an error at every call that changes the file system: no reported save is lost.

Python calls an audit hook before each such call; pwrite and fsync, which have no audit event, are
wrapped. A process is forked for each of the calls, and exits there or gets an error there.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import training
from forked_runs import last_acknowledged, resumed_step
from training import Acknowledged, Filled, make

from dream_callbacks.checkpoint.catalog import damage_of, read_catalog
from dream_callbacks.checkpoint.io.local_filesystem import LocalFilesystem
from dream_trainer.callbacks import Every
from dream_trainer.testing import run_on_ranks

UNTOLD = ("pwrite", "fsync")
CHANGING = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
CHANGING |= {f"os.{name}" for name in UNTOLD}


def is_change(event: str, args: tuple[Any, ...], root: str) -> bool:
    """Whether an audit event is a change below a directory."""
    if event in ("os.remove", "os.rmdir") and args[1] != -1:
        return True  # inside a folder that is being deleted
    if not args or not str(args[0]).startswith(root):
        return False
    if event == "open":
        return bool(args[2] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
    return event in CHANGING


def at_change(root: Path, number: int, act: Callable[[], None]) -> list[int]:
    """Call a function before each change below a directory; the list counts the changes."""
    count, counting = [0], threading.Lock()  # several files are synced at once

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if is_change(event, args, str(root / "dream-trainer")):
            with counting:
                count[0] += 1
                is_due = count[0] == number
            if is_due:
                act()

    def told(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def tell(descriptor: int, *args: Any) -> Any:
            hook(f"os.{name}", (str(Path(f"/proc/self/fd/{descriptor}").readlink()),))
            return call(descriptor, *args)

        return tell

    for name in UNTOLD:
        setattr(os, name, told(name))  # for the rest of this forked process
    sys.addaudithook(hook)
    return count


def run(root: Path, max_steps: int, **fields: Any) -> None:
    """Train and save each step, and record each reported save; keep two."""
    import logging

    logger = logging.getLogger("dream_callbacks.checkpoint")
    logger.setLevel(logging.INFO)
    logger.addHandler(Acknowledged(root / "acknowledged"))
    training = {"max_steps": max_steps, "n_epochs": 100}
    fields = {"every": Every(steps=1), "keep_last": 2, "save_on_signal": False, **fields}
    make(root, kind=Filled, training=training, **fields).fit()


def forked(function: Callable[[], None]) -> int:
    """Exit status of a forked process that calls a function."""
    process = os.fork()
    if process == 0:
        try:
            function()
        except BaseException:  # noqa: BLE001  # the parent sees the status
            os._exit(5)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def fields_of(root: Path, callback: str) -> dict[str, Any]:
    """The callback's kind; "url" for one that saves through fsspec, to the same place."""
    return {"root_dir": f"file://{root}"} if callback == "url" else {"callback": callback}


def stopped_at(number: int, root: Path, max_steps: int, **fields: Any) -> int:
    """Exit status of a run that is killed before one of its changes, if it makes so many."""

    def stop() -> None:
        at_change(root, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(root, max_steps, **fields)

    return forked(stop)


def stopped_everywhere(root: Path, callback: str, stride: int) -> int:
    """Kill a run at each of its changes; returns the number of changes."""
    number = 1 - stride
    while True:
        number += stride
        here = root / str(number)
        (here / "dream-trainer").mkdir(parents=True)
        fields = fields_of(here, callback)
        status = stopped_at(number, here, 4, **fields)
        acknowledged = last_acknowledged(here)
        if status == 0:
            assert acknowledged == 4
            return number - 1
        assert status == -signal.SIGKILL
        found = resumed_step(here, **fields) if acknowledged else None
        assert found is None or acknowledged <= found <= acknowledged + 1, f"change {number}"
        went_on = forked(lambda here=here, fields=fields: run(here, 5, **fields))  # type: ignore[misc]
        assert went_on == 0, f"change {number}"
        check_directory(here, last=5)


def check_directory(root: Path, last: int) -> None:
    """Check that all checkpoints are intact, and that there are no other files."""
    filesystem = LocalFilesystem(training.directory(root))
    catalog = read_catalog(filesystem)
    assert not catalog.damaged
    assert [c.step for c in catalog.checkpoints] == [last - 1, last]
    assert not [p for c in catalog.checkpoints for p in damage_of(filesystem, c, checksums=True)]
    assert not [name for name in filesystem.entries() if name.startswith(".")]


STRIDES = [
    pytest.param(7, id="every_7th"),
    pytest.param(1, id="every", marks=[pytest.mark.full, pytest.mark.timeout(900)]),
]


@pytest.mark.parametrize("callback", [*training.CALLBACKS, "url"])
@pytest.mark.parametrize("stride", STRIDES)
def test_a_crash_at_any_change_loses_nothing(tmp_path: Path, callback: str, stride: int) -> None:
    (num_changes,) = run_on_ranks(stopped_everywhere, 1, tmp_path, callback, stride, timeout_s=850)

    assert num_changes > 60


def failing_everywhere(root: Path, stride: int) -> tuple[int, list[int]]:
    """Make each change of a run fail once; the number of changes, and those that ended the run."""
    number, ended = 1 - stride, []
    while True:
        number += stride
        here = root / str(number)
        (here / "dream-trainer").mkdir(parents=True)
        counts = here / "count"

        def fail(here: Path = here, number: int = number, counts: Path = counts) -> None:
            def act() -> None:
                raise OSError(28, "No space left on device")

            count = at_change(here, number, act)
            run(here, 4)
            counts.write_text(str(count[0]))

        status = forked(fail)
        if status == 0 and int(counts.read_text()) < number:
            return number - 1, ended
        if status != 0:
            ended.append(number)
        assert forked(lambda here=here: run(here, 6)) == 0, f"change {number}"  # type: ignore[misc]
        assert resumed_step(here) == 6, f"change {number}"
        check_directory(here, last=6)


@pytest.mark.parametrize("stride", STRIDES)
def test_an_error_at_any_change_is_survived(tmp_path: Path, stride: int) -> None:
    ((num_changes, ended),) = run_on_ranks(failing_everywhere, 1, tmp_path, stride, timeout_s=850)

    assert num_changes > 150
    # An error before the first step ends the run with a message; an error of a save doesn't.
    assert max(ended) < 30


def replaced_everywhere(root: Path, callback: str, stride: int) -> int:
    """Kill a run that replaces the checkpoints of an abandoned branch, at each change."""
    number = 1 - stride
    while True:
        number += stride
        here = root / str(number)
        (here / "dream-trainer").mkdir(parents=True)
        fields = fields_of(here, callback)
        assert forked(lambda here=here, fields=fields: run(here, 3, **fields)) == 0  # type: ignore[misc]
        (here / "acknowledged").unlink()
        if stopped_at(number, here, 3, resume_mode=2, **fields) == 0:
            return number - 1
        assert resumed_step(here, **fields) == 3, f"change {number}: the old one or the new one"
        went_on = forked(lambda here=here, fields=fields: run(here, 5, **fields))  # type: ignore[misc]
        assert went_on == 0, f"change {number}"
        check_directory(here, last=5)


@pytest.mark.parametrize("callback", ["sync", "url"])
@pytest.mark.parametrize("stride", STRIDES)
def test_a_crash_during_a_replacement_leaves_one_of_the_two(
    tmp_path: Path, callback: str, stride: int
) -> None:
    (num_changes,) = run_on_ranks(replaced_everywhere, 1, tmp_path, callback, stride, timeout_s=850)

    assert num_changes > 10
