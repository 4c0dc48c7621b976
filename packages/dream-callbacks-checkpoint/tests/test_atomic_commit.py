"""A checkpoint gets its final name only after all of its files are on the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_runs import steps, tiny
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training import directory

from dream_callbacks.checkpoint.format import file_names
from dream_trainer.callbacks import Every


class Syncs:
    """Records the calls of fsync and rename, and makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: dict[str, int] = {}
        """Bytes of each file when it was last synced, by path."""
        self.renames: list[tuple[str, str, dict[str, int], dict[str, int]]] = []
        """Old path, new path, files at that time, and what of them was synced."""
        self.events: list[tuple[str, str]] = []
        self._fsync, self._rename = os.fsync, os.rename
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "rename", self.rename)

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        self.sizes[path] = os.fstat(descriptor).st_size
        self.events.append(("sync", path))

    def rename(self, old: str | Path, new: str | Path) -> None:
        files = {str(p): p.stat().st_size for p in Path(old).glob("*")}
        self.renames.append((str(old), str(new), files, dict(self.sizes)))
        self._rename(old, new)
        self.events.append(("rename", str(new)))


@pytest.mark.parametrize("callback", ["sync", "async"])
def test_every_file_is_synced_completely_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, callback: str
) -> None:
    syncs = Syncs(monkeypatch)

    tiny(tmp_path, callback=callback, every=Every(steps=4), keep_last=2).fit()

    commits = [r for r in syncs.renames if file_names.step_of(Path(r[1]).name) is not None]
    assert [Path(new).name for _, new, _, _ in commits] == [
        file_names.checkpoint_name(step) for step in (4, 8, 12, 16)
    ]
    for old, _, files, synced in commits:
        assert len(files) == 6
        for path, size in files.items():
            assert size > 0
            assert synced.get(path) == size, path
        assert old in synced, "the folder itself"


def test_the_directory_is_synced_after_each_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = Syncs(monkeypatch)

    tiny(tmp_path, every=Every(steps=4), keep_last=2).fit()

    root = str(directory(tmp_path))
    renames = [i for i, (event, path) in enumerate(syncs.events) if event == "rename"]
    of_root = [i for i in renames if str(Path(syncs.events[i][1]).parent) == root]
    assert len(of_root) >= 6
    assert all(syncs.events[index + 1] == ("sync", root) for index in of_root)


def test_new_parent_directories_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(monkeypatch)

    trainer = tiny(tmp_path / "new")
    trainer.setup()

    assert trainer.run_dir.parents[3] == tmp_path
    for path in (trainer.run_dir, *trainer.run_dir.parents[:4]):
        assert str(path) in syncs.sizes


def test_move_aside_syncs_the_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path, n_epochs=1).fit()
    syncs = Syncs(monkeypatch)

    tiny(tmp_path, resume_mode=None).setup()

    assert str(directory(tmp_path) / "before-1") in syncs.sizes


def test_nothing_is_deleted_before_its_successor_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = Syncs(monkeypatch)

    tiny(tmp_path, every=Every(steps=4), keep_last=1).fit()

    names = [Path(path).name for event, path in syncs.events if event == "rename"]
    order = [name.split("-")[0] for name in names if name.startswith(("step-", ".trash-"))]
    assert order == ["step"] + ["step", ".trash"] * 3
    assert steps(tmp_path) == [16]


def test_other_tools_read_the_files_through_dcp(tmp_path: Path) -> None:
    trainer = tiny(tmp_path)
    trainer.fit()

    dcp_to_torch_save(directory(tmp_path) / "step-0000000016", tmp_path / "all.pt")

    found = torch.load(tmp_path / "all.pt", weights_only=True)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(found["models"]["model"][name], tensor)
    assert "exp_avg" in found["optimizers"]["optimizer"]["state"]["embed.weight"]
