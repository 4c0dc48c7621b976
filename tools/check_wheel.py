"""Check an installed distribution: its files, and that every module imports.

Run by the interpreter that has it: `python tools/check_wheel.py dream-trainer-core`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import pkgutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.packages import BY_SHORT_NAME, DISTRIBUTIONS, Distribution

# Not installed with core alone, and slow to import.
NEVER_IMPORTED = ("rich", "wandb", "tensorboard", "torchmetrics", "numpy", "dream_callbacks")


def shipped_files(distribution: Distribution) -> list[str]:
    """Files of the installed distribution, without its metadata."""
    files = importlib.metadata.files(distribution.name) or []
    return [each.as_posix() for each in files if ".dist-info/" not in each.as_posix()]


def misplaced(distribution: Distribution, files: list[str]) -> list[str]:
    """Problems with the files of `distribution`; empty if there are none."""
    own = distribution.module.replace(".", "/")
    problems = [
        f"{distribution.name} ships {file}, which is outside {own}/"
        for file in files
        if not file.startswith(f"{own}/")
    ]
    problems += [
        f"{distribution.name} lacks {file}"
        for file in (f"{own}/__init__.py", f"{own}/py.typed")
        if file not in files
    ]
    sources = distribution.folder / "src"
    problems += [
        f"{distribution.name} lacks {module.as_posix()}, which is in its src folder"
        for module in sorted(path.relative_to(sources) for path in sources.rglob("*.py"))
        if module.as_posix() not in files
    ]
    return problems


def import_all(module: str) -> list[str]:
    """Import `module` and all below it.

    Returns:
        The modules' names.
    """
    package = importlib.import_module(module)
    names = [info.name for info in pkgutil.walk_packages(package.__path__, f"{module}.")]
    for name in names:
        importlib.import_module(name)
    return [module, *names]


def imported_needlessly(module: str) -> list[str]:
    """Top-level packages among NEVER_IMPORTED that `import module` adds to what torch imports."""
    importlib.import_module("torch")
    before = set(sys.modules)
    importlib.import_module(module)
    added = {name.partition(".")[0] for name in set(sys.modules) - before}
    return [name for name in NEVER_IMPORTED if name in added]


def main() -> int:
    """Check the distribution named on the command line; 1 if there is a problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("distribution", choices=[each.name for each in DISTRIBUTIONS])
    distribution = BY_SHORT_NAME[parser.parse_args().distribution.rpartition("-")[2]]

    problems = misplaced(distribution, shipped_files(distribution))
    if distribution.short_name == "core":
        problems += [
            f"import dream_trainer imports {name}" for name in imported_needlessly("dream_trainer")
        ]
    modules = import_all(distribution.module)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{distribution.name}: {len(modules)} modules imported, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
