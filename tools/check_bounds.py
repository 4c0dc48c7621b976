"""Check that versions, bounds and pins agree with each other."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.environments import torch_pin
from tools.packages import CORE, DISTRIBUTIONS, Distribution, requirement_name

# Major, minor, patch, then whether it is final: 0.1.0.dev0 comes before 0.1.0.
Version = tuple[int, int, int, bool]


def parsed(version: str) -> Version:
    """A version as a tuple that can be compared.

    Raises:
        ValueError: If it isn't X, X.Y or X.Y.Z, optionally with .devN.
    """
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?(\.dev\d+)?", version)
    if match is None:
        raise ValueError(f"{version!r} is not X.Y.Z or X.Y.Z.devN; other forms aren't used here")
    major, minor, patch = (int(part or 0) for part in match.groups()[:3])
    return major, minor, patch, match[4] is None


def bounds_of(requirement: str) -> tuple[Version | None, Version | None]:
    """The `>=` and the `<` of a requirement."""
    found: dict[str, Version] = {
        sign: parsed(version) for sign, version in re.findall(r"(>=|<)\s*([\w.]+)", requirement)
    }
    return found.get(">="), found.get("<")


def wrong_bound_on_core(requirement: str, core_version: str) -> str | None:
    """Why `requirement` isn't allowed as a callback package's bound on core; None if it is."""
    lower, upper = bounds_of(requirement)
    version = parsed(core_version)
    if lower is None or upper is None:
        return f"{requirement} needs both bounds: >=X.Y.0.dev0 and <(major + 1)"
    if lower[2:] != (0, False):
        return (
            f"{requirement}: a bound on core has the form >=X.Y.0.dev0, or the checkout is refused"
        )
    if not lower <= version < upper:
        return f"{requirement} refuses core {core_version}, the version in this checkout"
    if upper != (lower[0] + 1, 0, 0, True):
        return f"{requirement}: the upper bound is the next major version, <{lower[0] + 1}"
    return None


def problems_of(distribution: Distribution, core: Distribution) -> Iterator[str]:
    """Problems in one package's metadata."""
    project = distribution.pyproject()["project"]
    if project["requires-python"] != core.pyproject()["project"]["requires-python"]:
        yield f"requires-python {project['requires-python']} differs from core's"
    if set(project.get("optional-dependencies", {})) != set(distribution.extras):
        yield "its extras differ from those in tools/packages.py"
    extras = [r for extra in project.get("optional-dependencies", {}).values() for r in extra]
    for requirement in [*project["dependencies"], *extras]:
        if bounds_of(requirement)[0] is None:
            yield f"{requirement} has no lower bound"
    on_core = [r for r in project["dependencies"] if requirement_name(r) == CORE]
    if distribution is not core:
        if len(on_core) != 1:
            yield f"it must depend on {CORE}, once"
        wrong = (wrong_bound_on_core(each, core.version()) for each in on_core)
        yield from (each for each in wrong if each)
    for name in ("README.md", "CHANGELOG.md", "LICENSE"):
        if not (distribution.folder / name).is_file():
            yield f"{name} is missing"


def wrong_torch_pin(core: Distribution, pin: str) -> str | None:
    """Why the pinned torch doesn't fit core."""
    [requirement] = (
        r for r in core.pyproject()["project"]["dependencies"] if requirement_name(r) == "torch"
    )
    lower, _ = bounds_of(requirement)
    if lower is None or parsed(pin.partition("==")[2]) < lower:
        return f"constraints.txt pins {pin}, which core's {requirement} refuses"
    return None


def main() -> int:
    """Print each problem; 1 if there is any."""
    core = DISTRIBUTIONS[0]
    problems = [
        f"{each.name}: {problem}" for each in DISTRIBUTIONS for problem in problems_of(each, core)
    ]
    problems += [wrong] if (wrong := wrong_torch_pin(core, torch_pin())) else []
    for problem in problems:
        print(problem)
    print(f"check_bounds: {len(DISTRIBUTIONS)} packages, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
