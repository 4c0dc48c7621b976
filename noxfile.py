"""Sessions for all checks of the repository: `nox --list`. `tools/test` runs the default ones.

Packages are tested as installed by users: from wheels, in environments below `.nox/` without other
files of this repository. `tools/wheels.py` makes them, with one torch shared by all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from tools import matrix, oldest, run_snippets, wheels
from tools.environments import Environment
from tools.packages import (
    BY_SHORT_NAME,
    CORE,
    DISTRIBUTIONS,
    requirement_name,
    source_folders,
    third_party_requirements,
)
from tools.release import parsed_tag

STRICT = run_snippets.WARNINGS
PYTEST = ("pytest", "pytest-timeout", "pytest-xdist", "coverage")
IN_PARALLEL = ("-n", "2", "--dist", "loadfile")  # a test may have four ranks of its own

PACKAGES = [nox.param(name, id=name) for name in BY_SHORT_NAME]
CELLS = [nox.param(cell, id=str(cell), tags=["full"]) for cell in matrix.CELLS]
QUICK = nox.param("not full", id="quick", tags=["quick"])
SLOW = nox.param("full", id="slow", tags=["full"])
CELL_TESTS = ("integration_tests/test_loss_is_layout_independent.py", "-m", "full or not full")
TESTS_OF_GPU = "tools/tests/test_gpu.py"  # needs torch and all packages, unlike the other tools

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "none"  # tools/wheels.py makes the environments
nox.options.sessions = ["lint", "types", "wheels", "unit", "s3", "integration(quick)", "docs"]


def run(
    session: nox.Session,
    environment: Environment,
    *arguments: object,
    codes: Sequence[int] = (0,),
    **env: str,
) -> None:
    """Run `python …` of an environment, with its scripts first on the path."""
    env["PATH"] = f"{environment.python.parent}{os.pathsep}{os.environ['PATH']}"
    words = [environment.python, *arguments]
    here = [w.relative_to(ROOT) if isinstance(w, Path) and w.is_absolute() else w for w in words]
    session.run(*map(str, here), external=True, env=env, success_codes=codes)


def for_tests(packages: str, torch: str | None = None) -> Environment:
    """The environment of a package set of the matrix: `core`, `core+fsdp`, `all`."""
    ours = matrix.Cell(1, "single", packages).distributions
    tested = ours if packages == "all" else ours[-1:]  # core's tests need more than core
    needed = {each for distribution in tested for each in distribution.test_requirements}
    needed |= {"torchmetrics", "pyyaml"} if packages == "all" else set()
    name = packages if torch is None else f"{packages}-{torch.replace('==', '-')}"
    return wheels.installed(name, ours, [*PYTEST, *sorted(needed)], torch=torch)


@nox.session(tags=["quick"])
@nox.parametrize("package", PACKAGES)
def unit(session: nox.Session, package: str) -> None:
    """Run one package's tests on its wheel and core's, with its extras."""
    package_tests(session, package, "not full")


@nox.session(tags=["quick"])
def s3(session: nox.Session) -> None:
    """Run the tests of checkpoints behind URLs, with an S3 server on this machine."""
    tested = BY_SHORT_NAME["checkpoint"]
    needed = [*PYTEST, *tested.test_requirements, "moto[server]", "s3fs"]
    environment = wheels.installed("s3", [BY_SHORT_NAME["core"], tested], needed)
    tests = tested.folder / "tests" / "test_fsspec_filesystem.py"
    run(session, environment, "-m", "pytest", tests, "-k", "s3", *session.posargs)


@nox.session(tags=["full"])
@nox.parametrize("package", PACKAGES)
def slow(session: nox.Session, package: str) -> None:
    """Run one package's tests that are too slow for every change: all kills, all layouts."""
    package_tests(session, package, "full")


def package_tests(session: nox.Session, package: str, marked: str) -> None:
    """Run a package's tests that have a marker, in an environment with only their requirements."""
    environment = for_tests("core" if package == "core" else f"core+{package}")
    tests = BY_SHORT_NAME[package].folder / "tests"
    # Not every package has slow tests; pytest returns 5 if it finds none.
    codes = [0, 5] if marked == "full" else [0]
    command = ["-m", "pytest", tests, "-m", marked, *IN_PARALLEL]
    run(session, environment, *command, *session.posargs, codes=codes)


@nox.session
@nox.parametrize("cell", [QUICK, SLOW, *CELLS])
def integration(session: nox.Session, cell: matrix.Cell | str) -> None:
    """Run the integration tests: quick ones, slow ones, or one cell of the matrix."""
    if isinstance(cell, str):
        command = ["-m", "pytest", "integration_tests", TESTS_OF_GPU, "-m", cell, *IN_PARALLEL]
        run(session, for_tests("all"), *command, *session.posargs)
        return
    if cell.torch == "oldest" and "OLDEST_TORCH" not in os.environ:
        session.skip(f"installing {cell.torch_requirement} may fetch gigabytes: set OLDEST_TORCH=1")
    environment = for_tests(cell.packages, cell.torch_requirement)
    # The other files import what the environment of a cell doesn't have.
    run(session, environment, "-m", "pytest", *CELL_TESTS, f"--cell={cell}", *session.posargs)


@nox.session(tags=["quick"])
def types(session: nox.Session) -> None:
    """Check the packages' types with mypy and pyright, and those in typing_tests."""
    libraries = third_party_requirements()
    environment = wheels.installed("types", [], ["mypy", "basedpyright", "pytest", *libraries])
    sources = os.pathsep.join(map(str, source_folders()))
    run(session, environment, "-m", "mypy", *source_folders(), MYPYPATH=sources)
    checked = ["tools", "--exclude", "tools/benchmarks/"]
    run(session, environment, "-m", "mypy", *checked, MYPYPATH=sources)
    examples = [f for d in DISTRIBUTIONS if any((f := d.folder / "typing_tests").glob("*.py"))]
    for folder in examples:
        paths = f"{folder}{os.pathsep}{sources}"
        run(session, environment, "-m", "mypy", folder, MYPYPATH=paths)
    if examples:
        run(session, environment, "-m", "basedpyright", *examples)


@nox.session(tags=["quick"])
def lint(session: nox.Session) -> None:
    """Check style, format, imports between layers, docs and bounds; test the tools."""
    environment = wheels.with_tools("lint", ["ruff", "pytest", "pytest-timeout"])
    run(session, environment, "-m", "ruff", "check", "--output-format=concise", ".")
    run(session, environment, "-m", "ruff", "format", "--check", "--quiet", ".")
    run(session, environment, "tools/check_layout.py")
    run(session, environment, "tools/check_docs.py")
    run(session, environment, "tools/check_bounds.py")
    run(session, environment, "tools/lifecycle.py", "--check")
    run(session, environment, "tools/matrix.py", "--check")
    run(session, environment, "-m", "pytest", "tools/tests", "-q")


@nox.session(name="wheels", tags=["quick"])
def wheels_alone(session: nox.Session) -> None:
    """Install each wheel alone, without extras; import every module; check its files."""
    core = BY_SHORT_NAME["core"]
    for each in DISTRIBUTIONS:
        both = [core] if each is core else [core, each]
        environment = wheels.installed(f"wheel-{each.short_name}", both, extras=False)
        run(session, environment, *STRICT, "tools/check_wheel.py", each.name)
        if each is core:  # its README trains a model with core alone
            run(session, environment, "tools/run_snippets.py", each.folder / "README.md")
    # Again with all callback packages installed, which core must not import.
    run(session, for_tests("all"), "tools/check_wheel.py", core.name)


@nox.session(tags=["full"])
def oldest_core(session: nox.Session) -> None:
    """Run each package's tests on the oldest core and dependencies that it admits."""
    for each in DISTRIBUTIONS[1:]:
        bounds = oldest.exact_requirements(each)
        is_published = any(requirement_name(bound) == CORE for bound in bounds)
        ours = [each] if is_published else [BY_SHORT_NAME["core"], each]
        needed = [*PYTEST, *each.test_requirements, *bounds]
        environment = wheels.installed(f"oldest-{each.short_name}", ours, needed)
        run(session, environment, "tools/oldest.py", each.name)
        run(session, environment, "-m", "pytest", each.folder / "tests", *session.posargs)


@nox.session(tags=["full"])
def docs(session: nox.Session) -> None:
    """Run the Python in README and docs, then build the site; warnings are errors."""
    site = ["mkdocs", "mkdocs-material", "mkdocstrings-python"]
    environment = wheels.installed("docs", DISTRIBUTIONS, site)
    readmes = [ROOT / "README.md", *(each.folder / "README.md" for each in DISTRIBUTIONS)]
    pages = sorted((ROOT / "docs").rglob("*.md"))
    run(session, environment, "tools/run_snippets.py", *readmes, *pages)
    build = ["-m", "mkdocs", "build", "--strict", "--quiet"]
    run(session, environment, *build, NO_MKDOCS_2_WARNING="1")


@nox.session(tags=["full"])
def bench(session: nox.Session) -> None:
    """Run the benchmarks and compare them with their limits."""
    for script in sorted((ROOT / "tools" / "benchmarks").glob("*.py")):
        run(session, for_tests("all"), script, *session.posargs)


@nox.session
def release(session: nox.Session) -> None:
    """Build the distribution of a tag, `-- <distribution>-vX.Y.Z`, and test the wheel."""
    if len(session.posargs) != 1:
        session.error("give the tag: nox -s release -- dream-trainer-core-v0.1.0")
    environment = wheels.with_tools("release", ["build"])
    run(session, environment, "tools/release.py", *session.posargs)
    wanted = parsed_tag(session.posargs[0])
    both = dict.fromkeys([BY_SHORT_NAME["core"], wanted.distribution])
    name = wanted.distribution.name
    alone = wheels.installed(f"release-{wanted.distribution.short_name}", list(both), extras=False)
    [built] = (ROOT / "dist").glob(f"{name.replace('-', '_')}-{wanted.version}-*.whl")
    alone.install("--no-deps", "--force-reinstall", str(built))
    run(session, alone, *STRICT, "tools/check_wheel.py", name)
