"""Full disks, directories that can't be written to, leftovers: no reported save is lost."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from full_disks import Limit, full_disk
from mounts import have_mounts_of_its_own, mount, skip_unless_mountable
from tiny_runs import saved, steps, tiny
from training import directory

from dream_callbacks.checkpoint import CheckpointError
from dream_trainer.callbacks import Callback, Every
from dream_trainer.testing import run_on_ranks


def test_a_failed_save_does_not_stop_training(tmp_path: Path) -> None:
    ((*messages,),) = run_on_ranks(full_disk, 1, tmp_path)

    assert steps(tmp_path) == [2, 4, 10, 12, 14, 16]
    assert len(messages) == 2
    assert "the checkpoint of step 6 couldn't be saved in" in messages[0]
    assert "File too large" in messages[0]
    assert "__0_0.distcp" in messages[0]
    assert "the newest one is that of step 4" in messages[0]
    assert "Check the free space" in messages[0]
    assert not [p for p in directory(tmp_path).iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("callback", ["sync", "async"])
def test_only_durable_saves_are_reported(tmp_path: Path, callback: str) -> None:
    (messages,) = run_on_ranks(full_disk_aloud, 1, tmp_path, callback)

    said = [int(text.split()[2]) for text in messages if text.startswith("saved step ")]
    assert said == steps(tmp_path) == [2, 4, 10, 12, 14, 16]


def full_disk_aloud(root: Path, callback: str) -> list[str]:
    return full_disk(root, level=logging.INFO, callback=callback)


def test_a_failed_save_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    first, second = run_on_ranks(full_disk_on_one, 2, tmp_path)

    assert steps(tmp_path) == [2, 4, 10, 12, 14, 16]
    assert "rank 1: OSError: [Errno 27] File too large" in first[0]
    assert second == [], "one rank says it"


def full_disk_on_one(root: Path, **fields: Any) -> list[str]:
    """As `full_disk`, for the last rank."""
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    limit = Limit(5, 20_000, until=9) if is_last else Limit(10**9, 0)
    layout = "fsdp" if os.environ["WORLD_SIZE"] != "1" else "single"
    return full_disk(root, limit, layout=layout, **fields)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_on_save_error_raise_ends_the_run(tmp_path: Path, num_ranks: int) -> None:
    message, *others = run_on_ranks(full_disk_raises, num_ranks, tmp_path)

    assert all(other == message for other in others)
    assert "the checkpoint of step 6 couldn't be saved" in message
    assert "the newest one is that of step 4" in message
    assert "training continues" not in message
    assert steps(tmp_path) == [2, 4]


def full_disk_raises(root: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        full_disk_on_one(root, on_save_error="raise")
    return str(caught.value)


class Fill(Callback[Any]):
    """Fills the disk at step 5, and frees it at step 9."""

    def __init__(self, disk: Path, num_free: int) -> None:
        self.disk = disk
        self.num_free = num_free

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self.trainer.global_step == 5:
            num_bytes = shutil.disk_usage(self.disk).free - self.num_free
            (self.disk / "filler").write_bytes(bytes(num_bytes))
        elif self.trainer.global_step == 9:
            (self.disk / "filler").unlink()


def on_small_disk(disk: Path, num_free: int) -> list[str]:
    have_mounts_of_its_own()
    mount("tmpfs", "size=8m", "tmpfs", disk)
    messages = full_disk(disk, Fill(disk, num_free))
    assert steps(disk) == [2, 4, 10, 12, 14, 16]
    assert not [p for p in directory(disk).iterdir() if p.name.startswith(".")]
    return messages


def test_free_space_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    skip_unless_mountable(tmp_path, "tmpfs")

    (messages,) = run_on_ranks(on_small_disk, 1, tmp_path / "disk", 100_000)

    assert len(messages) == 2
    assert re.search(
        r"no space left for it: it needs 1.0 MiB, and \d+.\d KiB are free", messages[0]
    )
    assert "the newest one is that of step 4" in messages[0]


def on_read_only_disk(disk: Path) -> str:
    have_mounts_of_its_own()
    mount("tmpfs", "size=8m", "tmpfs", disk)
    tiny(disk).fit()
    mount("tmpfs", "remount,ro", "tmpfs", disk)
    with pytest.raises(CheckpointError) as caught:
        tiny(disk).setup()
    return str(caught.value)


def test_a_read_only_disk_is_refused_before_the_first_step(tmp_path: Path) -> None:
    skip_unless_mountable(tmp_path, "tmpfs")

    (message,) = run_on_ranks(on_read_only_disk, 1, tmp_path / "disk")

    assert "can't be written to" in message
    assert "Read-only file system" in message
    assert "set root_dir to a directory that this user may write to" in message


def as_nobody(function: Callable[[], object]) -> int:
    """Exit status of an unprivileged process that calls a function."""
    process = os.fork()
    if process == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            function()
        except CheckpointError as error:
            os._exit(3 if "may write to" in str(error) else 4)
        except BaseException:  # noqa: BLE001  # the parent sees the status
            os._exit(5)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_directory_that_cant_be_written_to_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    (status,) = run_on_ranks(unwritable, 1, tmp_path)

    assert status == 3


def unwritable(root: Path) -> int:
    for path in (root, *root.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/") and path != Path("/tmp"):
            path.chmod(0o755)
    root.chmod(0o555)
    # Import everything now: the user "nobody" may not be able to read the modules.
    trainer = tiny(root / "x", n_epochs=1, training={"max_steps": 1})
    return as_nobody(trainer.setup)


def test_a_file_instead_of_the_directory_is_refused(tmp_path: Path) -> None:
    trainer = tiny(tmp_path)
    trainer.run_dir.parent.mkdir(parents=True)
    trainer.run_dir.write_text("a file")

    with pytest.raises(CheckpointError, match="can't be written to"):
        trainer.setup()


# Leftovers


def test_unfinished_writes_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    tiny(tmp_path, n_epochs=1).fit()
    root = directory(tmp_path)
    unique = "0123456789abcdef" * 2
    for name in (f".tmp-step-0000000009-{unique}", f".trash-{unique}"):
        (root / name).mkdir()
        (root / name / "__0_0.distcp").write_bytes(b"half")
    (root / f".probe-{unique}").write_bytes(b"")
    (root / "metrics-0000000003.json").write_bytes(b"")
    (root / f"metrics-0000000008.json.{unique}.tmp").write_bytes(b"")
    (root / "notes.txt").write_text("mine")
    (root / ".tmp-mine").mkdir()

    tiny(tmp_path, n_epochs=1).fit()

    names = {path.name for path in root.iterdir()}
    assert names == {"step-0000000008", "run.lock", "notes.txt", ".tmp-mine"}


@pytest.mark.parametrize("both", [False, True], ids=["between_the_renames", "after_them"])
def test_an_interrupted_replacement_is_undone_or_finished(tmp_path: Path, both: bool) -> None:
    tiny(tmp_path, n_epochs=1).fit()
    root = directory(tmp_path)
    old = root / (".old-step-0000000008-" + "ab" * 16)
    if both:
        shutil.copytree(root / "step-0000000008", old)
    else:
        (root / "step-0000000008").rename(old)

    trainer = tiny(tmp_path)
    trainer.setup()

    assert trainer.global_step == 8
    assert {path.name for path in root.iterdir()} == {"step-0000000008", "run.lock"}


def test_an_incomplete_folder_neither_counts_nor_is_deleted(tmp_path: Path) -> None:
    tiny(tmp_path, n_epochs=1, every=Every(steps=2)).fit()
    torn = directory(tmp_path) / "step-0000000006" / "__0_0.distcp"
    torn.write_bytes(torn.read_bytes()[:-1])

    tiny(tmp_path, n_epochs=2, every=Every(steps=4), keep_last=2).fit()

    assert steps(tmp_path) == [6, 12, 16]
    assert [c.step for c in saved(tmp_path)] == [6, 12, 16]
