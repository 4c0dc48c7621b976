"""The command line: its text and JSON output."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogs import manifest
from damaged_files import damage, reseal
from tiny_runs import read_tensors, scored, steps, tiny
from training import different, directory, weights

from dream_callbacks.checkpoint import load_weights
from dream_callbacks.checkpoint.__main__ import main
from dream_callbacks.checkpoint.catalog import read_catalog
from dream_callbacks.checkpoint.command_output import table
from dream_callbacks.checkpoint.errors import format_bytes
from dream_callbacks.checkpoint.io.local_filesystem import DirectoryLock, LocalFilesystem
from dream_callbacks.checkpoint.retention import Choice, candidates
from dream_trainer.callbacks import Every
from dream_trainer.testing.trainers import TinyModel


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run with four checkpoints."""
    values = {4: 2.0, 8: math.inf, 12: 1.0, 16: 3.0}
    training = {"val_every_n_steps": 4}
    tiny(tmp_path, kind=scored(values), every=Every(steps=4), training=training).fit()
    return tmp_path


def output(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status and not captured.out else captured.out


def test_ls_shows_a_line_per_checkpoint(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "ls", directory(root), "--monitor", "val_loss").splitlines()

    assert lines[1].split() == ["step", "epoch", "saved", "size", "ranks", "val_loss", "why"]
    assert [line.split()[0] for line in lines[2:]] == ["4", "8", "12", "16"]
    assert [line.split()[7] for line in lines[2:]] == ["2", "inf", "1", "3"]
    assert max(map(len, lines[1:])) <= 100


def test_ls_json_is_strict_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "ls", "--json", directory(root).parent)

    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))
    assert [c["step"] for c in document["checkpoints"]] == [4, 8, 12, 16]
    assert [c["metrics"]["val_loss"] for c in document["checkpoints"]] == [2.0, "inf", 1.0, 3.0]


def test_ls_reports_damage(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(directory(root) / "step-0000000012" / "MANIFEST.json")

    text = output(capsys, "ls", directory(root))

    assert "step-0000000012 is damaged: MANIFEST.json: its own checksum doesn't match" in text


def test_verify_accepts_intact_checkpoints(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "verify", directory(root)).splitlines()

    assert [line.split()[1] for line in lines] == ["intact"] * 4


def test_verify_finds_damage_and_fails(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(directory(root) / "step-0000000008" / "__0_0.distcp")

    text = output(capsys, "verify", directory(root), status=1)

    assert "step-0000000008  damaged" in text
    assert "step-0000000008/__0_0.distcp: its checksum doesn't match" in text
    assert text.count("intact") == 3
    output(capsys, "verify", directory(root), "--step", 4)
    output(capsys, "verify", directory(root) / "step-0000000004")
    found = json.loads(output(capsys, "verify", "--json", directory(root), status=1))
    assert [bool(found["damage"][name]) for name in sorted(found["damage"])] == [0, 1, 0, 0]


def test_show_lists_the_content(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "show", directory(root))

    assert "global_step      16" in text
    assert "result val_loss  3" in text
    assert "models.model.blocks.0.weight  float32  8×8" in text
    document = json.loads(output(capsys, "show", "--json", "--step", 4, directory(root)))
    assert document["counters"]["global_step"] == 4
    assert document["tensors"]["models.model.head.weight"] == ["torch.float32", [1, 8]]


def test_prune_applies_the_retention_rules(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = ("--keep-last", 1, "--keep-top-k", 1)

    dry = output(capsys, "prune", directory(root), *rules, "--dry-run")
    assert steps(root) == [4, 8, 12, 16]
    assert dry.splitlines()[-1].startswith("would delete 2 of 4")

    output(capsys, "prune", directory(root), *rules)
    assert steps(root) == [12, 16]


def test_prune_never_deletes_the_newest(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output(capsys, "prune", directory(root), "--keep-last", 0)

    assert steps(root) == [16]


def test_prune_keeps_a_checkpoint_that_is_being_read(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LocalFilesystem(directory(root)).reading("step-0000000004"):
        output(capsys, "prune", directory(root), "--keep-last", 1)

    assert steps(root) == [4, 16]


def test_prune_is_refused_while_a_run_is_active(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = DirectoryLock(directory(root) / "run.lock", "aa")
    lock.acquire()
    try:
        text = output(capsys, "prune", directory(root), "--keep-last", 1, status=1)
    finally:
        lock.release()

    assert "in use by" in text
    assert steps(root) == [4, 8, 12, 16]


@pytest.mark.parametrize("name", ["out/model.safetensors", "out/model.pt", "out"])
def test_export_writes_weights_without_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pytest.importorskip("safetensors")
    trainer = tiny(tmp_path, n_epochs=1)
    trainer.fit()

    output(capsys, "export", directory(tmp_path), tmp_path / name)

    (path,) = [p for p in (tmp_path / "out").iterdir() if p.suffix != ".sha256"]
    found = {f"model.{key}": tensor for key, tensor in read_tensors(path).items()}
    assert not different(found, weights(trainer))


@pytest.mark.parametrize(
    ("flags", "step"),
    [
        (["--best"], 12),
        (["--best", "--mode", "max"], 8),
        (["--last"], 16),
        (["--step", 4], 4),
        ([], 16),
    ],
    ids=str,
)
def test_export_chooses_a_checkpoint(
    root: Path, capsys: pytest.CaptureFixture[str], flags: list[Any], step: int
) -> None:
    text = output(capsys, "export", directory(root), *flags, root / "model.pt")

    assert f"from step-{step:010d}" in text
    module = TinyModel(8, 2)
    load_weights(directory(root), module, step)
    assert not different(read_tensors(root / "model.pt"), module.state_dict())


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--best", "--monitor", "bleu", "--mode", "max"], "--best uses 'bleu'.*or --last"),
        (["--best", "--monitor", "bleu"], "--best by 'bleu'"),
        (["--step", 5], "--step 5 asks for step-0000000005, which doesn't exist"),
    ],
    ids=str,
)
def test_export_of_no_checkpoint_writes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], flags: list[Any], error: str
) -> None:
    text = output(capsys, "export", directory(root), *flags, root / "out" / "model.pt", status=1)

    assert re.search(error, text)
    assert not (root / "out").exists()


def test_export_of_one_checkpoint_is_of_no_other(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = directory(root) / "step-0000000008"

    assert "from step-0000000008" in output(capsys, "export", one, root / "model.pt")
    text = output(capsys, "export", one, "--best", root / "model.pt", status=1)
    assert "is the checkpoint of step 8; give the run directory" in text
    text = output(capsys, "export", one, "s3://bucket/model.pt", status=1)
    assert "'s3://bucket/model.pt' is a URL" in text


def test_export_refuses_a_damaged_checkpoint(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(directory(root) / "step-0000000016" / "__0_0.distcp")

    text = output(capsys, "export", directory(root), root / "model.pt", status=1)

    assert "its checksum doesn't match; give the --step of another checkpoint: 4, 8, 12, 16" in text
    assert not (root / "model.pt").exists()


def test_export_writes_nothing_outside_of_its_folder(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = directory(root) / "step-0000000016"
    state = json.loads((folder / "state.json").read_bytes())
    state["models"] = {"../elsewhere": {}}
    (folder / "state.json").write_text(json.dumps(state))
    reseal(folder)

    text = output(capsys, "export", folder, root / "out", "--format=torch", status=1)

    assert "'../elsewhere' isn't the name of a model" in text
    assert not list(root.rglob("elsewhere*"))


@pytest.mark.parametrize("command", ["ls", "verify", "show"])
def test_a_directory_without_checkpoints_is_an_error(
    root: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = output(capsys, command, root, status=1)

    assert f"there are checkpoints in {directory(root)}" in text


def test_it_runs_as_a_module_and_survives_a_closed_pipe(root: Path) -> None:
    command = (
        f"{sys.executable} -m dream_callbacks.checkpoint ls --json {directory(root)} | head -1"
    )

    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)

    assert found.stdout == "{\n"
    assert found.stderr == ""


def test_read_only_commands_do_not_import_torch(root: Path) -> None:
    program = """
import sys
from dream_callbacks.checkpoint.__main__ import main

status = main(sys.argv[1:])
sys.exit(status or "torch" in sys.modules)
"""
    for command in (["ls"], ["ls", "--json"], ["prune", "--keep-last=1", "--dry-run"]):
        subprocess.run([sys.executable, "-c", program, *command, directory(root)], check=True)


def test_ten_thousand_checkpoints_are_listed_and_chosen_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(10_000):
        folder = tmp_path / f"step-{step:010d}"
        folder.mkdir()
        (folder / "MANIFEST.json").write_bytes(manifest(step=step, seq=step).encode())

    text = output(capsys, "ls", tmp_path)
    newest = candidates(read_catalog(LocalFilesystem(tmp_path)), Choice("last"))

    assert len(text.splitlines()) == 10_002
    assert newest.checkpoints[0].step == 9_999


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (2.5 * 2**30, "2.5 GiB")],
)
def test_sizes_have_readable_units(num_bytes: float, expected: str) -> None:
    assert format_bytes(num_bytes) == expected


def test_numeric_columns_are_right_aligned() -> None:
    rows: list[Any] = [["a", "1", "x"], ["bb", "100", ""]]

    assert table(["n", "c", "t"], rows).splitlines() == ["n     c  t", "a     1  x", "bb  100"]


def test_the_commands_never_unpickle(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)

    assert main(["show", str(directory(root))]) == 0
    assert main(["verify", str(directory(root))]) == 0
    assert main(["export", str(directory(root)), str(root / "model.pt")]) == 0
    assert torch.load(root / "model.pt", weights_only=True)
