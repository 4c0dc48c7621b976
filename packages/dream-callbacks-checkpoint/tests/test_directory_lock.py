"""Only one run at a time writes to a directory."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from dream_callbacks.checkpoint import CheckpointError
from dream_callbacks.checkpoint.io.local_filesystem import DirectoryLock


def in_child(function: object) -> int:
    """Exit status of a forked process that calls a function."""
    process = os.fork()
    if process == 0:
        try:
            assert callable(function)
            function()
        except CheckpointError:
            os._exit(3)
        except BaseException:  # noqa: BLE001  # the parent sees the status
            os._exit(4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_another_process_is_refused_until_the_lock_is_released(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock = DirectoryLock(path, "aa")

    lock.acquire()

    assert in_child(DirectoryLock(path, "bb").acquire) == 3
    lock.release()
    assert in_child(DirectoryLock(path, "bb").acquire) == 0


def test_asking_whether_the_lock_is_held_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock, other = DirectoryLock(path, "aa"), DirectoryLock(path, "bb")

    def check_from_outside(expected: bool) -> None:
        def compare() -> None:
            assert DirectoryLock(path, "cc").is_held_elsewhere() is expected

        assert in_child(compare) == 0

    assert not lock.is_held_elsewhere()
    assert not path.exists()
    lock.acquire()
    assert not lock.is_held_elsewhere()
    assert other.is_held_elsewhere()
    check_from_outside(True)
    check_from_outside(True)
    lock.release()
    assert not other.is_held_elsewhere()
    check_from_outside(False)
    assert lock.fence == 1


def test_the_error_names_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        DirectoryLock(path, "aa").acquire()
        os.write(writing, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reading, 1)

    with pytest.raises(CheckpointError, match=rf"in use by process {process} on .* since 2"):
        DirectoryLock(path, "bb").acquire()

    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    DirectoryLock(path, "bb").acquire()  # released by the kernel


def test_another_object_of_the_same_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock = DirectoryLock(path, "aa")
    lock.acquire()

    with pytest.raises(CheckpointError, match="another trainer of this process"):
        DirectoryLock(path, "bb").acquire()

    lock.release()
    lock.acquire()
    lock.release()


def test_a_forked_child_doesnt_have_the_lock(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path / "run.lock", "aa")
    lock.acquire()

    def child() -> None:
        assert not lock.is_held
        lock.release()

    assert in_child(child) == 0
    assert lock.is_held
    assert in_child(DirectoryLock(lock.path, "bb").acquire) == 3
    lock.release()


def test_a_worker_that_outlives_its_run_does_not_hold_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        DirectoryLock(path, "aa").acquire()
        worker = os.fork()
        if worker != 0:
            os.write(writing, worker.to_bytes(4, "big"))
        time.sleep(60)
        os._exit(0)
    worker = int.from_bytes(os.read(reading, 4), "big")
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    try:
        lock = DirectoryLock(path, "bb")
        lock.acquire()
        os.kill(worker, 0)  # it is there
        lock.release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_each_holder_has_a_higher_fence(tmp_path: Path) -> None:
    fences = []
    for run in ("aa", "bb", "cc"):
        lock = DirectoryLock(tmp_path / "run.lock", run)
        lock.acquire()
        fences.append(lock.fence)
        lock.check()
        lock.release()

    assert fences == [1, 2, 3]


def test_a_holder_notices_that_the_lock_was_lost(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock = DirectoryLock(path, "aa")
    lock.acquire()
    # As may happen on a network file system.
    content = json.dumps({"pid": 1, "run": "bb", "fence": 9}).ljust(4096)

    # In a child: closing the file in this process would release the lock.
    assert in_child(lambda: path.write_text(content)) == 0

    with pytest.raises(CheckpointError, match="another run has taken over"):
        lock.check()
    lock.release()


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"fence": "x"}'])
def test_a_malformed_lock_file_is_ignored(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.lock"
    path.write_text(content)
    lock = DirectoryLock(path, "aa")

    lock.acquire()

    assert lock.fence == 1
    lock.release()
