"""Names of other distributions: missing, present, too old, broken inside, in real environments.

Each environment is a folder of links to everything that this interpreter can import, except for
`dream_callbacks`, and a package that the test writes; a new interpreter sees only that folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from dream_trainer import callbacks, configs
from dream_trainer.callbacks import _aliases
from dream_trainer.trainer import mixins

CONTRACT = {
    "checkpoint": {
        "CheckpointCallback",
        "AsyncCheckpointCallback",
        "LoadPartialCheckpointCallback",
        "ExportCallback",
        "CheckpointParameters",
    },
    "logging": {
        "LoggerCallback",
        "LRLoggerCallback",
        "MetricLoggerCallback",
        "MediaLoggerCallback",
        "ModelWatchCallback",
        "JSONLinesSink",
        "TensorBoardSink",
        "WandBSink",
    },
    "summary": {"ProgressBar", "TrainerSummary", "ModelSummary"},
    "profile": {"ProfileCallback", "FindGraphBreaksCallback", "BenchmarkCallback"},
    "fsdp": {"OptimizeFSDP"},
}

# Prints, for each name in argv, the result of importing it.
ASK = """
import importlib, json, sys, warnings
warnings.simplefilter("error")
answers = {}
for target in sys.argv[1:]:
    module, name = target.rsplit(".", 1)
    try:
        answers[target] = repr(getattr(importlib.import_module(module), name))
    except BaseException as error:
        answers[target] = f"{type(error).__name__}: {error}"
import dream_trainer.callbacks, dream_trainer.configs, dream_trainer.trainer.mixins
for module in (dream_trainer.callbacks, dream_trainer.configs, dream_trainer.trainer.mixins):
    namespace = {}
    exec(f"from {module.__name__} import *", namespace)
    answers[module.__name__] = dir(module)
answers["imported"] = [name for name in sys.modules if name.partition(".")[0] in (
    "rich", "wandb", "tensorboard", "torchmetrics")]
print(json.dumps(answers))
"""


def environment(folder: Path) -> Path:
    """A folder with links to all importable modules except dream_callbacks."""
    standard = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    folder.mkdir()
    for path in (Path(entry) for entry in sys.path if entry and entry not in standard):
        if path.is_dir() and "lib-dynload" not in path.name:
            for entry in path.iterdir():
                link = folder / entry.name
                if not entry.name.startswith("dream_callbacks") and not link.exists():
                    link.symlink_to(entry)
    return folder


def install(folder: Path, package: str, source: str, version: str | None = None) -> None:
    """Write a package of the namespace to the folder, with metadata if it has a version."""
    home = folder / "dream_callbacks" / package
    home.mkdir(parents=True)
    (home / "__init__.py").write_text(source)
    if version is not None:
        metadata = folder / f"dream_callbacks_{package}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(
            f"Metadata-Version: 2.1\nName: dream-callbacks-{package}\nVersion: {version}\n"
        )


def ask(folder: Path, *targets: str) -> dict[str, Any]:
    """Results of importing names such as `a.b.Name` in a new interpreter with only that folder."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", ASK, *targets],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def named(name: str) -> str:
    return f"dream_trainer.callbacks.{name}"


def test_the_table_matches_the_contract() -> None:
    table = _aliases._NAMES_BY_PACKAGE  # noqa: SLF001  # it is what the test is about

    assert {k: set(v) for k, v in table["dream_trainer.callbacks"].items()} == CONTRACT
    assert table["dream_trainer.trainer.mixins"] == {"logging": ("WandBLoggerMixin",)}
    assert table["dream_trainer.configs"] == {"checkpoint": ("CheckpointParameters",)}


def test_type_checkers_see_exactly_these_names() -> None:
    source = Path(callbacks.__file__).read_text()
    block = source.partition("if TYPE_CHECKING:")[2].partition("__all__")[0]
    told = {
        line.rsplit(" as ", 1)[1].rstrip(",\n") for line in block.splitlines() if " as " in line
    }

    assert told == set.union(*CONTRACT.values())


def test_a_missing_package_is_an_import_error_that_names_it(tmp_path: Path) -> None:
    targets = [named(name) for names in CONTRACT.values() for name in sorted(names)]
    others = [
        "dream_trainer.trainer.mixins.WandBLoggerMixin",
        "dream_trainer.configs.CheckpointParameters",
    ]
    answers = ask(environment(tmp_path / "nothing"), *targets, *others)

    for package, names in CONTRACT.items():
        for name in names:
            assert answers[named(name)] == (
                f"ImportError: {name} is in dream-callbacks-{package}, which is not installed: "
                f"pip install dream-callbacks-{package}"
            )
    assert answers[others[0]].startswith("ImportError: WandBLoggerMixin is in dream-callbacks-logg")
    assert answers[others[1]].startswith(
        "ImportError: CheckpointParameters is in dream-callbacks-c"
    )
    assert answers["imported"] == []


def test_missing_old_and_broken_packages_are_distinguished(tmp_path: Path) -> None:
    folder = environment(tmp_path / "mixed")
    install(folder, "checkpoint", "class CheckpointCallback: ...", version="0.0.1")  # too old
    install(folder, "logging", "import a_library_that_is_missing", version="1.0")  # broken inside
    install(folder, "fsdp", "OptimizeFSDP = 'the real one'", version="1.0")  # present
    install(folder, "profile", "BenchmarkCallback = 1")  # too old, and not from a wheel
    answers = ask(
        folder,
        named("CheckpointCallback"),
        named("ExportCallback"),
        "dream_trainer.configs.CheckpointParameters",
        named("LoggerCallback"),
        "dream_trainer.trainer.mixins.WandBLoggerMixin",
        named("OptimizeFSDP"),
        named("ProfileCallback"),
        named("ProgressBar"),
        named("NoSuchCallback"),
    )

    assert answers[named("CheckpointCallback")] == (
        "<class 'dream_callbacks.checkpoint.CheckpointCallback'>"
    )
    assert answers[named("ExportCallback")] == (
        "ImportError: ExportCallback is not in the installed dream-callbacks-checkpoint 0.0.1: "
        "pip install --upgrade dream-callbacks-checkpoint"
    )
    assert "is not in the installed" in answers["dream_trainer.configs.CheckpointParameters"]
    missing = "ModuleNotFoundError: No module named 'a_library_that_is_missing'"
    assert answers[named("LoggerCallback")] == missing
    assert answers["dream_trainer.trainer.mixins.WandBLoggerMixin"] == missing
    assert answers[named("OptimizeFSDP")] == "'the real one'"
    assert answers[named("ProfileCallback")] == (
        "ImportError: ProfileCallback is not in the installed dream-callbacks-profile: "
        "pip install --upgrade dream-callbacks-profile"
    )
    assert answers[named("ProgressBar")].startswith(
        "ImportError: ProgressBar is in dream-callbacks-s"
    )
    assert answers[named("NoSuchCallback")] == (
        "AttributeError: module 'dream_trainer.callbacks' has no attribute 'NoSuchCallback'"
    )


@pytest.mark.full
def test_no_error_inside_a_package_is_hidden(tmp_path: Path) -> None:
    folder = environment(tmp_path / "broken")
    install(folder, "checkpoint", "from dream_trainer.callbacks import NoSuchName")
    install(folder, "logging", "import dream_callbacks.logging.sinks")
    install(folder, "fsdp", "1 / 0")
    install(folder, "profile", "def __getattr__(name): raise RuntimeError(f'no {name}')")
    install(folder, "summary", "this is no Python")
    answers = ask(
        folder,
        named("CheckpointCallback"),
        named("LoggerCallback"),
        named("OptimizeFSDP"),
        named("ProfileCallback"),
        named("ProgressBar"),
    )

    assert answers[named("CheckpointCallback")].startswith(
        "ImportError: cannot import name 'NoSuchName' from 'dream_trainer.callbacks'"
    )
    assert answers[named("LoggerCallback")] == (
        "ModuleNotFoundError: No module named 'dream_callbacks.logging.sinks'"
    )
    assert answers[named("OptimizeFSDP")] == "ZeroDivisionError: division by zero"
    assert answers[named("ProfileCallback")] == "RuntimeError: no ProfileCallback"
    assert answers[named("ProgressBar")].startswith("SyntaxError: invalid syntax")


@pytest.mark.full
def test_dir_lists_what_can_be_imported_and_never_raises(tmp_path: Path) -> None:
    every = set.union(*CONTRACT.values())
    folder = environment(tmp_path / "listed")
    assert not every & {*ask(folder)["dream_trainer.callbacks"]}

    install(folder, "fsdp", "1 / 0")
    install(folder, "checkpoint", "")
    answers = ask(folder)
    listed = CONTRACT["fsdp"] | CONTRACT["checkpoint"]
    assert every & {*answers["dream_trainer.callbacks"]} == listed
    assert every & {*answers["dream_trainer.configs"]} == {"CheckpointParameters"}


@pytest.mark.parametrize("package", CONTRACT)
def test_names_resolve_to_the_installed_package(package: str) -> None:
    module = pytest.importorskip(f"dream_callbacks.{package}", exc_type=ModuleNotFoundError)
    for name in CONTRACT[package]:
        assert getattr(callbacks, name) is getattr(module, name)
        assert name in dir(callbacks)
    if package == "logging":
        assert mixins.WandBLoggerMixin is module.WandBLoggerMixin
    if package == "checkpoint":
        assert configs.CheckpointParameters is module.CheckpointParameters


@pytest.mark.parametrize("module", [callbacks, configs, mixins], ids=lambda each: each.__name__)
def test_other_names_are_attribute_errors(module: Any) -> None:
    assert not hasattr(module, "no_such_name")
    assert not hasattr(module, "__wrapped__")
    assert set(module.__all__) <= set(dir(module))
