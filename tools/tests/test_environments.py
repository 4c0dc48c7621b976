from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools.environments import Environment, fingerprint, torch_pin


def test_a_fingerprint_changes_with_words_paths_and_contents(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    before = fingerprint(["word"], [file])

    assert before == fingerprint(["word"], [file])
    assert before != fingerprint(["words"], [file])
    file.write_text("two")
    assert before != fingerprint(["word"], [file])


def test_the_pin_of_torch_is_read_from_the_constraints(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text("# pins\ntorchmetrics==1.0\ntorch==2.13.0\n")

    assert torch_pin(file) == "torch==2.13.0"


def test_constraints_without_torch_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text("rich==15.0.0\n")

    with pytest.raises(ValueError, match="no line torch=="):
        torch_pin(file)


def test_an_environment_records_what_was_installed(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    assert not environment.has("stamp")

    environment.create()
    environment.mark("stamp")

    assert environment.has("stamp")
    assert not environment.has("another stamp")
    environment.create()
    assert not environment.has("stamp")


def test_an_environment_sees_the_one_below_after_its_own_packages(tmp_path: Path) -> None:
    below = Environment(tmp_path / "below")
    above = Environment(tmp_path / "above", below)
    below.create()
    above.create()
    for name, folder in (("both", below), ("both", above), ("only_below", below)):
        (folder.site_packages() / f"{name}.py").write_text(f"place = {folder.path.name!r}")

    code = "import both, only_below; print(both.place, only_below.place)"
    shown = subprocess.run(
        [str(above.python), "-c", code], check=True, capture_output=True, text=True
    )
    assert shown.stdout.split() == ["above", "below"]
