"""The exact lower bounds: what to install for them, and whether it got installed.

Run by the interpreter of the environment: `python tools/oldest.py dream-callbacks-summary`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.check_bounds import parsed
from tools.packages import BY_SHORT_NAME, CORE, DISTRIBUTIONS, Distribution, requirement_name


def lower_bounds(distribution: Distribution) -> dict[str, str]:
    """Each direct dependency's oldest admitted version, by name; extras included, torch left out.

    For core: the checkout's version if the bound equals it, else the first release of the bound:
    `>=0.2.0.dev0` -> `0.2.0`.
    """
    project = distribution.pyproject()["project"]
    extras = project.get("optional-dependencies", {}).values()
    requirements = [*project["dependencies"], *(each for extra in extras for each in extra)]
    bounds = {requirement_name(r): r.partition(">=")[2].partition(",")[0] for r in requirements}
    bounds.pop("torch", None)
    if CORE in bounds and bounds[CORE] != BY_SHORT_NAME["core"].version():
        bounds[CORE] = re.sub(r"\.dev\d+$", "", bounds[CORE])
    return bounds


def exact_requirements(distribution: Distribution) -> list[str]:
    """Requirements for pip that make everything except torch as old as the bounds admit."""
    bounds = lower_bounds(distribution)
    if bounds.get(CORE) == BY_SHORT_NAME["core"].version():
        del bounds[CORE]  # not published: its wheel is built here
    return sorted(f"{name}=={version}" for name, version in bounds.items())


def newer_than_asked(distribution: Distribution) -> list[str]:
    """Distributions installed in another version than the bound, which a test would not test."""
    installed = {name: importlib.metadata.version(name) for name in lower_bounds(distribution)}
    return [
        f"{name} {installed[name]} is installed, {version} was to be tested"
        for name, version in lower_bounds(distribution).items()
        if parsed(installed[name]) != parsed(version)
    ]


def main() -> int:
    """Compare installed versions with the bounds; 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("distribution", choices=[each.name for each in DISTRIBUTIONS])
    distribution = BY_SHORT_NAME[parser.parse_args().distribution.rpartition("-")[2]]
    problems = newer_than_asked(distribution)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"oldest: {lower_bounds(distribution)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
