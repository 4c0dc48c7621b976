"""The list of distributions: names, modules, folders, and requirements of their tests."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

CORE = "dream-trainer-core"


@dataclass(frozen=True)
class Distribution:
    """One package of this repository.

    Args:
        name: Name for pip.
        module: Name to import.
        extras: All its extras; its tests run with them.
        test_requirements: What its tests need besides pytest.
    """

    name: str
    module: str
    extras: tuple[str, ...] = ()
    test_requirements: tuple[str, ...] = ()

    @property
    def short_name(self) -> str:
        """Name in sessions and package sets: `core`, `checkpoint`, …"""
        return self.name.rpartition("-")[2]

    @property
    def folder(self) -> Path:
        """The folder of its pyproject.toml."""
        return ROOT / "packages" / self.name

    @property
    def namespace(self) -> str:
        """The folder below `src` that its wheel ships."""
        return self.module.partition(".")[0]

    def pyproject(self) -> dict[str, Any]:
        """Its pyproject.toml."""
        return tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))

    def version(self) -> str:
        """The version in its pyproject.toml."""
        return str(self.pyproject()["project"]["version"])

    def requirement(self, source: Path | str) -> str:
        """Requirement for pip: `source` (a wheel or a folder) with all extras."""
        return f"{source}[{','.join(self.extras)}]" if self.extras else str(source)


DISTRIBUTIONS: tuple[Distribution, ...] = (
    # numpy: the state of its random numbers is saved too, where it is installed.
    Distribution(CORE, "dream_trainer", test_requirements=("numpy",)),
    Distribution(
        "dream-callbacks-checkpoint",
        "dream_callbacks.checkpoint",
        extras=("fsspec", "safetensors"),
        test_requirements=("numpy", "torchdata"),  # numpy: its random numbers are saved too
    ),
    Distribution(
        "dream-callbacks-logging",
        "dream_callbacks.logging",
        extras=("wandb", "tensorboard"),
    ),
    # numpy: without it torch prints a warning to the terminal that the tests check.
    Distribution(
        "dream-callbacks-summary", "dream_callbacks.summary", test_requirements=("numpy",)
    ),
    Distribution("dream-callbacks-profile", "dream_callbacks.profile", extras=("view",)),
    Distribution("dream-callbacks-fsdp", "dream_callbacks.fsdp"),
)

BY_SHORT_NAME: dict[str, Distribution] = {each.short_name: each for each in DISTRIBUTIONS}


def source_folders() -> list[Path]:
    """Each package's `src`, for MYPYPATH and the like."""
    return [each.folder / "src" for each in DISTRIBUTIONS]


def requirement_name(requirement: str) -> str:
    """`"safetensors[torch]>=0.4.5"` -> `"safetensors"`."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise ValueError(f"{requirement!r} doesn't start with the name of a distribution")
    return match[0]


def third_party_requirements() -> list[str]:
    """Third-party requirements of all packages, with extras, without torch."""
    own = {each.name for each in DISTRIBUTIONS}
    found = set()
    for distribution in DISTRIBUTIONS:
        project = distribution.pyproject()["project"]
        extras = project.get("optional-dependencies", {}).values()
        found |= {*project["dependencies"], *(each for extra in extras for each in extra)}
    return sorted(r for r in found if requirement_name(r) not in own | {"torch"})
