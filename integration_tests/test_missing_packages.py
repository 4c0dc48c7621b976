"""Each package alone, and each package missing: the others work, and an error names it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
from toy import CALLBACKS

# Trains with the installed callbacks in argv[1]; imports the missing ones in argv[2].
SCRIPT = """
import sys
import dream_trainer
heavy = {"rich", "wandb", "tensorboard", "torchmetrics", "dream_callbacks"} & {*sys.modules}
assert not heavy, heavy
from dream_trainer import callbacks
from dream_trainer.testing import TinyTrainer, tiny_config
present, missing = (argument.split() for argument in sys.argv[1:])
trainer = TinyTrainer(tiny_config("runs", [getattr(callbacks, name)() for name in present]))
trainer.fit()
assert trainer.global_step == 8
for name in missing:
    try:
        getattr(callbacks, name)
    except ImportError as error:
        print(error)
"""


def environment(folder: Path, without: set[str]) -> Path:
    """A folder with links to all importable modules except some packages."""
    standard = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    (folder / "dream_callbacks").mkdir(parents=True)
    for path in (Path(entry) for entry in sys.path if entry and entry not in standard):
        for entry in path.iterdir() if path.is_dir() and "lib-dynload" not in path.name else ():
            link = folder / entry.name
            if not entry.name.startswith("dream_callbacks") and not link.exists():
                link.symlink_to(entry)
    for package in CALLBACKS.keys() - without:
        spec = find_spec(f"dream_callbacks.{package}")
        assert spec is not None and spec.submodule_search_locations is not None
        home = next(iter(spec.submodule_search_locations))
        (folder / "dream_callbacks" / package).symlink_to(home)
    return folder


QUICK = ("checkpoint", "all")
CASES = [
    pytest.param(without, id=name, marks=() if name in QUICK else pytest.mark.full)
    for name, without in (("none", set()), *((n, {n}) for n in CALLBACKS), ("all", set(CALLBACKS)))
]


@pytest.mark.parametrize("without", CASES)
def test_other_packages_work_without_one(tmp_path: Path, without: set[str]) -> None:
    present = " ".join(CALLBACKS[name] for name in sorted(CALLBACKS.keys() - without))
    missing = " ".join(CALLBACKS[name] for name in sorted(without))
    done = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT, present, missing],
        env={**os.environ, "PYTHONPATH": str(environment(tmp_path / "libraries", without))},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )

    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "not installed" in line]
    assert said == [
        f"{CALLBACKS[name]} is in dream-callbacks-{name}, which is not installed: "
        f"pip install dream-callbacks-{name}"
        for name in sorted(without)
    ]
