"""Damage to any file of a checkpoint is detected before the model is changed."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_files import damage, files_of, reseal
from training import different, directory, make, weights

from dream_callbacks.checkpoint import CheckpointError, DamagedCheckpointError
from dream_callbacks.checkpoint.catalog import damage_of, read_catalog
from dream_callbacks.checkpoint.format.manifest import sealed, unsealed
from dream_callbacks.checkpoint.io.local_filesystem import LocalFilesystem
from dream_trainer.callbacks import Every
from dream_trainer.testing import TinyTrainer, run_on_ranks

OLDER, NEWER = "step-0000000004", "step-0000000008"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two checkpoints."""
    root = tmp_path_factory.mktemp("pristine")
    tiny(root, n_epochs=1).fit()
    assert sorted(path.name for path in directory(root).glob("step-*")) == [OLDER, NEWER]
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "root"))


def tiny(root: Path, *, n_epochs: int = 2, **checkpoint: Any) -> TinyTrainer:
    trainer: TinyTrainer = make(
        root,
        kind=TinyTrainer,
        every=Every(steps=4),
        training={"n_epochs": n_epochs},
        **checkpoint,
    )
    return trainer


def problems(folder: Path) -> list[str]:
    """Problems found in a checkpoint."""
    filesystem = LocalFilesystem(folder.parent)
    catalog = read_catalog(filesystem)
    if folder.name in catalog.damaged:
        return [catalog.damaged[folder.name]]
    (checkpoint,) = [c for c in catalog.checkpoints if c.name == folder.name]
    return damage_of(filesystem, checkpoint, checksums=True)


def test_an_unchanged_checkpoint_is_intact(root: Path) -> None:
    assert problems(directory(root) / NEWER) == []


FULL = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.mark.parametrize("num_flips", [600, pytest.param(10_000, marks=FULL)])
def test_any_flipped_bit_is_detected(root: Path, num_flips: int) -> None:
    draw = random.Random(0)
    folder = directory(root) / NEWER
    files = files_of(folder)
    for file in files:
        original = file.read_bytes()
        assert original
        for _ in range(-(-num_flips // len(files))):
            bit = draw.randrange(len(original) * 8)
            flipped = bytearray(original)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)

            assert problems(folder), f"bit {bit} of {file.name}"
        file.write_bytes(original)
    assert problems(folder) == []


def test_any_flipped_bit_of_a_manifest_is_detected(root: Path) -> None:
    manifest = directory(root) / NEWER / "MANIFEST.json"
    original = manifest.read_bytes()
    for bit in range(len(original) * 8):
        flipped = bytearray(original)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedCheckpointError):
            unsealed(bytes(flipped))


@pytest.mark.parametrize("num_lengths", [120, pytest.param(1000, marks=FULL)])
def test_any_truncation_is_detected(root: Path, num_lengths: int) -> None:
    draw = random.Random(1)
    folder = directory(root) / NEWER
    files = files_of(folder)
    for file in files:
        original = file.read_bytes()
        drawn = (draw.randrange(len(original)) for _ in range(-(-num_lengths // len(files))))
        for length in {0, 1, len(original) - 1, *drawn}:
            file.write_bytes(original[:length])

            assert problems(folder), f"{length} bytes of {file.name}"
        file.write_bytes(original)


def test_a_missing_file_is_detected(root: Path) -> None:
    folder = directory(root) / NEWER
    for file in files_of(folder):
        original = file.read_bytes()
        file.unlink()

        assert problems(folder), file.name
        file.write_bytes(original)


def test_a_symlink_instead_of_a_file_is_refused(root: Path, tmp_path: Path) -> None:
    folder = directory(root) / NEWER
    for file in files_of(folder):
        moved = file.rename(tmp_path / f"moved-{file.name}")
        file.symlink_to(moved)

        assert "regular file" in problems(folder)[0]
        file.unlink()
        moved.rename(file)


def test_a_pipe_instead_of_a_file_is_refused_without_blocking(root: Path) -> None:
    folder = directory(root) / NEWER
    for file in files_of(folder):
        original = file.read_bytes()
        file.unlink()
        os.mkfifo(file)

        assert "regular file" in problems(folder)[0]
        file.unlink()
        file.write_bytes(original)


def test_a_symlink_instead_of_a_checkpoint_is_refused(root: Path, tmp_path: Path) -> None:
    folder = directory(root) / NEWER
    folder.symlink_to(folder.rename(tmp_path / "moved"))

    assert problems(folder) == ["it isn't a folder"]


@pytest.mark.parametrize("name", ["__0_0.distcp", "state.json", "rank-00000.json", "index.json"])
def test_a_run_resumes_from_the_newest_intact_checkpoint(
    root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(directory(root) / NEWER / name)

    trainer = tiny(root)
    trainer.setup()

    assert trainer.global_step == 4
    assert f"{NEWER} is damaged: {NEWER}/{name}: its checksum doesn't match" in caplog.text


def test_all_ranks_choose_the_same_checkpoint_if_one_detects_damage(tmp_path: Path) -> None:
    run_on_ranks(save_on_ranks, 2, tmp_path / "original")
    names = [path.name for path in files_of(directory(tmp_path / "original") / NEWER)]
    assert {"__0_0.distcp", "__1_0.distcp", "rank-00001.json"} <= set(names)
    for name in names:
        shutil.copytree(tmp_path / "original", tmp_path / name)
        damage(directory(tmp_path / name) / NEWER / name)

    results = run_on_ranks(steps_resumed, 2, [tmp_path / name for name in ("original", *names)])

    assert results == [[8] + [4] * len(names)] * 2


def save_on_ranks(root: Path) -> None:
    tiny(root, n_epochs=1, layout="fsdp").fit()


def steps_resumed(roots: list[Path]) -> list[int]:
    trainers = [tiny(root, layout="fsdp") for root in roots]
    for trainer in trainers:
        trainer.setup()
    return [trainer.global_step for trainer in trainers]


def test_a_damaged_manifest_is_skipped_with_a_warning(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(directory(root) / NEWER / "MANIFEST.json")

    trainer = tiny(root)
    trainer.setup()

    assert trainer.global_step == 4
    assert f"{NEWER}: MANIFEST.json: its own checksum doesn't match" in caplog.text


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(root: Path) -> None:
    damage(directory(root) / NEWER / "__0_0.distcp")

    tiny(root).fit()

    assert problems(directory(root) / NEWER) == []


def test_a_run_is_refused_if_all_checkpoints_are_damaged(root: Path) -> None:
    damage(directory(root) / NEWER / "index.json")
    damage(directory(root) / OLDER / "index.json")
    trainer = tiny(root)

    with pytest.raises(CheckpointError, match=r"is intact .*restore one from a copy"):
        trainer.setup()


def test_a_run_is_refused_if_no_manifest_is_valid(root: Path) -> None:
    for folder in directory(root).glob("step-*"):
        damage(folder / "MANIFEST.json")

    with pytest.raises(CheckpointError, match="there are checkpoints, and none is intact"):
        tiny(root).setup()


def test_a_damaged_checkpoint_of_a_requested_step_is_an_error(root: Path) -> None:
    damage(directory(root) / NEWER / "__0_0.distcp")
    trainer = tiny(root, resume_mode=8)

    with pytest.raises(CheckpointError, match=r"__0_0.distcp: its checksum"):
        trainer.setup()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "index.json", "rank-00000.json"])
def test_the_model_is_unchanged_when_a_checkpoint_is_refused(root: Path, name: str) -> None:
    damage(directory(root) / NEWER / name)
    fresh = tiny(root.parent / "elsewhere")
    fresh.setup()
    trainer = tiny(root, resume_mode=8)

    with pytest.raises(CheckpointError):
        trainer.setup()

    assert not different(weights(fresh), weights(trainer))
    assert not trainer.optimizer.state


# Malicious files, with correct checksums


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The test takes at most 64 MiB of Python's memory."""
    tracemalloc.start()
    yield
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64 << 20


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def pickled(attack: Attack) -> bytes:
    return pickle.dumps(attack)


def torch_saved(attack: Attack) -> bytes:
    buffer = io.BytesIO()
    torch.save(attack, buffer)
    return buffer.getvalue()


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("kind", [pickled, torch_saved])
def test_a_planted_pickle_is_never_executed(root: Path, kind: Any, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    folder = directory(root) / NEWER
    assert pickle.loads(pickled(Attack(trace))) is None
    assert trace.exists(), "the attack works where it is unpickled"
    trace.rmdir()
    for file in files_of(folder):
        original = file.read_bytes()
        file.write_bytes(kind(Attack(trace)))
        if file.name != "MANIFEST.json":
            reseal(folder)

        trainer = tiny(root, resume_mode=8)
        if file.name == ".metadata":  # no reader
            trainer.setup()
            assert trainer.global_step == 8
        else:
            with pytest.raises(CheckpointError):
                trainer.setup()

        assert not trace.exists(), file.name
        file.write_bytes(original)
        reseal(folder)


@pytest.mark.usefixtures("little_memory")
def test_a_pickle_instead_of_a_tensor_is_never_executed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Users may set it; it must have no effect.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trace = tmp_path / "executed"
    folder = directory(root) / NEWER
    attack = torch_saved(Attack(trace))
    (folder / "__9_0.distcp").write_bytes(attack)
    index = json.loads((folder / "index.json").read_bytes())
    index["files"].append("__9_0.distcp")
    chunk = index["tensors"]["models.model.head.weight"][2][0]
    chunk[2:] = [index["files"].index("__9_0.distcp"), 0, len(attack)]
    (folder / "index.json").write_text(json.dumps(index))
    reseal(folder)

    with pytest.raises(CheckpointError, match="a tensor can't be read: UnpicklingError"):
        tiny(root, resume_mode=8).setup()

    assert not trace.exists()


def change_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / "index.json").read_bytes())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    reseal(folder)


@pytest.mark.usefixtures("little_memory")
def test_nothing_outside_the_folder_is_read(root: Path) -> None:
    folder = directory(root) / NEWER
    change_index(folder, lambda index: index["files"].__setitem__(0, f"../{OLDER}/__0_0.distcp"))

    with pytest.raises(CheckpointError, match="is no file of the checkpoint"):
        tiny(root, resume_mode=8).setup()


@pytest.mark.usefixtures("little_memory")
def test_a_manifest_that_names_a_file_outside_the_folder_is_refused(root: Path) -> None:
    path = directory(root) / NEWER / "MANIFEST.json"
    document = unsealed(path.read_bytes())
    document["files"][f"../{OLDER}/index.json"] = [1, 1]
    path.write_bytes(sealed(document))

    with pytest.raises(CheckpointError, match="nothing outside of it is read"):
        tiny(root, resume_mode=8).setup()


def shrink(index: Any) -> None:
    index["tensors"]["models.model.blocks.0.weight"][2][0][1] = [4, 8]


def shift(index: Any) -> None:
    index["tensors"]["models.model.blocks.0.weight"][2][0][0] = [1, 0]


def double(index: Any) -> None:
    index["tensors"]["models.model.blocks.0.weight"][2] = [
        [[0, 0], [4, 8], 0, 0, 10],
        [[2, 0], [4, 8], 0, 0, 10],
    ]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("change", [shrink, shift, double])
def test_a_tensor_whose_pieces_do_not_tile_it_is_refused(root: Path, change: Any) -> None:
    change_index(directory(root) / NEWER, change)

    with pytest.raises(CheckpointError, match=r"blocks.0.weight.*(don't fill|outside)"):
        tiny(root, resume_mode=8).setup()


@pytest.mark.usefixtures("little_memory")
def test_an_index_cannot_allocate_more_memory_than_the_files_have(root: Path) -> None:
    def blow_up(index: Any) -> None:
        tensor = index["tensors"]["rank-00000.trainer.random_state.torch"]
        tensor[1] = tensor[2][0][1] = [10**13]

    change_index(directory(root) / NEWER, blow_up)

    with pytest.raises(CheckpointError, match=r"random_state.torch.* bytes, which can't hold it"):
        tiny(root, resume_mode=8).setup()


@pytest.mark.usefixtures("little_memory")
def test_a_deeply_nested_state_is_refused(root: Path) -> None:
    folder = directory(root) / NEWER
    (folder / "state.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000)
    reseal(folder)

    with pytest.raises(CheckpointError, match="not JSON"):
        tiny(root, resume_mode=8).setup()
