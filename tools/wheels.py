"""Environments with the packages installed from wheels, as for users.

They are below `.nox/`. All share one pinned torch (`.nox/torch`). An environment is made again when
its requirements change, and gets new wheels when files of a package change.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.environments import CONSTRAINTS, ROOT, Environment, fingerprint, torch_pin
from tools.packages import DISTRIBUTIONS, Distribution

FOLDER = ROOT / ".nox"

_VERSION = f"python {sys.version}"


@functools.cache
def torch_environment(requirement: str | None = None) -> Environment:
    """The environment with only torch and its dependencies.

    Args:
        requirement: Such as `torch==2.11.0`. Default: the pin.
    """
    wanted = requirement or torch_pin()
    environment = Environment(FOLDER / wanted.replace("==", "-"))
    stamp = fingerprint([_VERSION, wanted])
    if not environment.has(stamp):
        print(f"installing {wanted}, once for all environments", flush=True)
        environment.create()
        environment.install(wanted, constraints=_constraints(requirement))
        environment.mark(stamp)
    return environment


def with_tools(name: str, requirements: Sequence[str]) -> Environment:
    """The environment `.nox/<name>` with these requirements, without torch and our packages."""
    environment = Environment(FOLDER / name)
    stamp = fingerprint([_VERSION, *requirements], [CONSTRAINTS])
    if not environment.has(stamp):
        environment.create()
        environment.install(*requirements)
        environment.mark(stamp)
    return environment


@functools.cache
def built_wheels() -> dict[str, Path]:
    """The wheel of each distribution, by name; built again if its files changed."""
    builder = with_tools("build", ["hatchling"])
    return {each.name: _built_wheel(each, builder) for each in DISTRIBUTIONS}


def _built_wheel(distribution: Distribution, builder: Environment) -> Path:
    folder = FOLDER / "wheels" / distribution.name
    stamp = fingerprint([], _files(distribution))
    if not builder.has(stamp, distribution.name) or not list(folder.glob("*.whl")):
        for old in folder.glob("*.whl"):
            old.unlink()
        command = [
            str(builder.python),
            "-m",
            "hatchling",
            "build",
            "-t",
            "wheel",
            "-d",
            str(folder),
        ]
        subprocess.run(command, check=True, cwd=distribution.folder, capture_output=True)
        builder.mark(stamp, distribution.name)
    [wheel] = folder.glob("*.whl")
    return wheel


def _files(distribution: Distribution) -> list[Path]:
    """All files that a wheel is built from."""
    kept = [distribution.folder / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    sources = (distribution.folder / "src").rglob("*")
    return kept + sorted(f for f in sources if f.is_file() and "__pycache__" not in f.parts)


def installed(
    name: str,
    distributions: Sequence[Distribution],
    requirements: Sequence[str] = (),
    *,
    extras: bool = True,
    torch: str | None = None,
) -> Environment:
    """The environment `.nox/<name>`: torch, wheels of these distributions, their dependencies.

    Args:
        name: Name of its folder.
        distributions: The only ones of this repository that are installed.
        requirements: Others to install, such as the test runner.
        extras: Whether to install the distributions' extras.
        torch: Such as `torch==2.11.0`. Default: the pin.
    """
    torch_layer = torch_environment(torch)
    environment = Environment(FOLDER / name, below=torch_layer)
    wheels = [built_wheels()[each.name] for each in distributions]
    constraints = _constraints(torch)

    third_party = fingerprint(
        [_VERSION, *map(str, wheels), *requirements, str(extras), str(torch)],
        [constraints, *(each.folder / "pyproject.toml" for each in distributions)],
    )
    ours = fingerprint([], wheels)
    if not environment.has(third_party, "third-party"):
        print(f"making {environment.path.relative_to(ROOT)}", flush=True)
        environment.create()
        wanted = [
            each.requirement(wheel) if extras else str(wheel)
            for each, wheel in zip(distributions, wheels, strict=True)
        ]
        environment.install(*wanted, *requirements, constraints=constraints)
        environment.mark(third_party, "third-party")
    elif not environment.has(ours, "ours"):
        environment.install("--no-deps", "--force-reinstall", *map(str, wheels))
    environment.mark(ours, "ours")
    return environment


def _constraints(torch: str | None) -> Path:
    """The repository's constraints, with another torch if one is given."""
    if torch is None:
        return CONSTRAINTS
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("torch==")]
    file = FOLDER / f"constraints-{torch.replace('==', '-')}.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join([*pins, torch]) + "\n")
    return file
