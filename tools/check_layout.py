"""Check the rules of the architecture: the namespace, file names, imports between layers."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.packages import DISTRIBUTIONS, Distribution

FORBIDDEN_NAMES = ("utils.py", "helpers.py", "common.py", "types.py")

# Core, from the bottom up. A module imports from its own layer and those before it; a module
# belongs to the layer with the longest name that it starts with.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "dream_trainer.callbacks._aliases",
        "dream_trainer.interface.intersection",
        "dream_trainer.interface.lr_schedule",
        "dream_trainer.numbers",
    ),
    ("dream_trainer.configs",),
    ("dream_trainer.world",),
    ("dream_trainer.interface.trainer", "dream_trainer.interface.weights_source"),
    ("dream_trainer.callbacks",),
    ("dream_trainer.trainer.",),
    ("dream_trainer.trainer", "dream_trainer.trainer.mixins", "dream_trainer.trainer.dream"),
    ("dream_trainer.entrypoint", "dream_trainer.utils"),
    ("dream_trainer", "dream_trainer.testing"),
)


@dataclass(frozen=True)
class Import:
    """A name that a module imports, outside of `if TYPE_CHECKING`."""

    target: str
    line: int


def imports_of(source: str) -> Iterator[Import]:
    """All imports in `source` that happen at run time, also those inside functions.

    `from a.b import c` gives `a.b.c`, whether or not `c` is a module.
    """
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(f"{node.module}.{a.name}", node.lineno) for a in node.names)
        pending += ast.iter_child_nodes(node)


def layer_of(module: str) -> int | None:
    """The index in LAYERS; None for a module that isn't in core."""
    names = [(name, index) for index, layer in enumerate(LAYERS) for name in layer]
    matches = [
        (len(name), index)
        for name, index in names
        if module == name or module.startswith(name if name.endswith(".") else f"{name}.")
    ]
    return max(matches)[1] if matches else None


def breaks_a_rule(module: str, target: str, core_modules: set[str]) -> str | None:
    """Why `module` must not import `target`; None if it may.

    Args:
        module: The one that imports.
        target: A module, or a module and a name in it.
        core_modules: All modules of core, to tell the two apart.
    """
    if module.startswith("dream_callbacks."):
        return _breaks_a_rule_of_callback_packages(module, target)
    if target.startswith("dream_callbacks"):
        return "core imports no callback package"
    imported = target if target in core_modules else target.rpartition(".")[0]
    own_layer, layer = layer_of(module), layer_of(imported)
    if own_layer is not None and layer is not None and layer > own_layer:
        return f"{imported} stands above it"
    return None


def _breaks_a_rule_of_callback_packages(module: str, target: str) -> str | None:
    own_package = ".".join(module.split(".")[:2])
    if target.startswith("dream_callbacks") and not f"{target}.".startswith(f"{own_package}."):
        return "a callback package imports no other"
    if target.startswith("dream_trainer") and "._" in target:
        return "a callback package imports only public names of core"
    return None


def module_name(path: Path, source_folder: Path) -> str:
    """`…/src/a/b/__init__.py` -> `a.b`."""
    parts = path.relative_to(source_folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def misplaced_files(distribution: Distribution) -> Iterator[str]:
    """Files whose name or place is against the rules."""
    source_folder = distribution.folder / "src"
    for path in sorted(source_folder.rglob("*.py")):
        if path.name in FORBIDDEN_NAMES:
            yield f"{path}: name the thing; {path.name} says nothing"
        if path.relative_to(source_folder).as_posix() == "dream_callbacks/__init__.py":
            yield f"{path}: dream_callbacks is a namespace; this file would hide its other packages"
    package = source_folder / distribution.module.replace(".", "/")
    if not (package / "py.typed").is_file():
        yield f"{package}: py.typed is missing, so type checkers ignore its annotations"


def wrong_imports(distribution: Distribution, core_modules: set[str]) -> Iterator[str]:
    """Imports that break a rule, with file and line."""
    source_folder = distribution.folder / "src"
    for path in sorted(source_folder.rglob("*.py")):
        module = module_name(path, source_folder)
        for found in imports_of(path.read_text(encoding="utf-8")):
            reason = breaks_a_rule(module, found.target, core_modules)
            if reason is not None:
                yield f"{path}:{found.line}: {module} imports {found.target}; {reason}"


def main() -> int:
    """Print each violation; 1 if there is any."""
    core_source = DISTRIBUTIONS[0].folder / "src"
    core_modules = {module_name(path, core_source) for path in core_source.rglob("*.py")}
    problems = [
        problem
        for distribution in DISTRIBUTIONS
        for check in (misplaced_files(distribution), wrong_imports(distribution, core_modules))
        for problem in check
    ]
    for problem in problems:
        print(problem)
    print(f"check_layout: {len(DISTRIBUTIONS)} packages, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
