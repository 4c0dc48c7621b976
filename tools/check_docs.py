"""Check that the reference and the architecture page agree with the code."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.packages import DISTRIBUTIONS, ROOT

REFERENCE = ROOT / "docs" / "reference"
EXPLANATION = ROOT / "docs" / "explanation"
ARCHITECTURE = EXPLANATION / "architecture.md"
SOURCES = tuple(each.folder / "src" for each in DISTRIBUTIONS)
CORE = SOURCES[0] / "dream_trainer"
PUBLIC_PACKAGES = ("callbacks", "configs", "testing", "trainer", "trainer/mixins", "world")

# In the Markdown: `path/to/file.py`, and names such as `_watch` in the cell after it.
_FILE = re.compile(r"`([\w/]+\.py)`")
_NAME = re.compile(r"`(\w+)`")
_STORE_METHODS = ("set", "get", "add", "append", "check", "compare_set", "count", "wait_for_all")


# The reference


def documented(pages: Iterable[str]) -> set[str]:
    """Dotted names that pages show: those after `:::`."""
    return {name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)}


def is_documented(name: str, shown: set[str], exports: dict[str, set[str]]) -> bool:
    """Whether a name is shown itself, or belongs to a package that is shown.

    Args:
        name: Dotted.
        shown: From `documented`.
        exports: The names in `__all__`, by package.
    """
    module, _, last = name.rpartition(".")
    return name in shown or (module in shown and last in exports.get(module, set()))


def names_of_core(source: str) -> Iterator[str]:
    """What a module imports from core, for type checkers too; `a.b.c` for `from a.b import c`."""
    for node in ast.walk(_tree(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dream_trainer"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("dream_trainer"))


def exported(source: str) -> set[str]:
    """The names in a module's `__all__`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def undocumented() -> Iterator[str]:
    """Names of core that are public and aren't in the reference."""
    shown = documented(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    exports = {
        f"dream_trainer.{package.replace('/', '.')}": exported(
            _text(CORE / package / "__init__.py")
        )
        for package in PUBLIC_PACKAGES
    }
    for package, names in exports.items():
        for name in sorted(names):
            if not is_documented(f"{package}.{name}", shown, exports):
                yield f"{package}.{name} is public; show it in {_place(REFERENCE)}"
    for path in _modules(SOURCES[1:]):
        for name in sorted(set(names_of_core(_text(path)))):
            if not is_documented(name, shown, exports):
                yield f"{_place(path)} imports {name}; show it in {_place(REFERENCE)}"


# The architecture page


def found(path: str) -> Path | None:
    """The file of a path in a page: in core, in a callback package, or from the root."""
    folders = [CORE, *(source / "dream_callbacks" for source in SOURCES[1:]), ROOT]
    return next((folder / path for folder in folders if (folder / path).is_file()), None)


def wrong_files(page: str) -> Iterator[str]:
    """Files in a page that don't exist, and names in a table that the file before them lacks."""
    for line in page.splitlines():
        cells = line.strip().strip("|").split("|") if line.startswith("|") else [line]
        for cell, after in zip(cells, [*cells[1:], ""], strict=True):
            for path in _FILE.findall(cell):
                file = found(path)
                if file is None:
                    yield f"there is no {path}"
                elif after.strip() and not _NAME.sub("", after).strip(" ,"):
                    text = _text(file)
                    for name in _NAME.findall(after):
                        if not re.search(rf"\b(def|class) {name}\b", text):
                            yield f"{path} doesn't define {name}"


def starts_threads(source: str) -> bool:
    """Whether a module starts a thread."""
    names = {
        ast.unparse(node.func) for node in ast.walk(_tree(source)) if isinstance(node, ast.Call)
    }
    return bool(names & {"threading.Thread", "Thread", "Timer", "call_in_daemon_thread"})


def thread_names(source: str) -> set[str]:
    """The names of the threads that a module starts, as far as they are literals."""
    names = set()
    for node in ast.walk(_tree(source)):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in ("threading.Thread", "Thread"):
                names |= {_literal(k.value) for k in node.keywords if k.arg == "name"}
            elif function == "call_in_daemon_thread":
                names.add(_literal(node.args[0]))
    return names - {""}


def store_keys(source: str) -> set[str]:
    """The keys that a module uses in the ranks' store, each up to its first variable part."""
    keys = set()
    for node in ast.walk(_tree(source)):
        is_key = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("_key")
        if is_key and isinstance(node, ast.Assign):
            keys.add(_literal(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            receiver = ast.unparse(node.func.value)
            if node.func.attr in _STORE_METHODS and receiver.endswith(("store", "client")):
                first = node.args[0]
                listed = first.elts if isinstance(first, ast.List) else [first]
                keys |= {_literal(each) for each in listed}
    return keys - {""}


def group_kinds(source: str) -> set[str]:
    """The kinds of process groups that a module asks for or has as a default."""
    pattern = r"""group\("([\w-]+)"\)|oordination\([\w.]+, "([\w-]+)"|kind: str = "([\w-]+)\""""
    return {name for match in re.findall(pattern, source) for name in match if name}


def section(page: str, heading: str) -> str:
    """The text below a heading of the second level, up to the next one."""
    return page.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def missing_in_architecture(page: str) -> Iterator[str]:
    """Threads, keys and groups of the code that are missing from the page's tables."""
    threads = section(page, "Threads")
    files = {found(path) for path in _FILE.findall(threads)}
    for path in _modules(SOURCES):
        source = _text(path)
        if path.name != "daemon_thread.py" and starts_threads(source) and path not in files:
            yield f"{_place(path)} starts a thread; add it to the table of threads"
        in_tables = [
            ("thread", thread_names(source), threads),
            ("process group", group_kinds(source), section(page, "Process groups")),
        ]
        if path.is_relative_to(CORE / "world"):
            in_tables += [("key", store_keys(source), section(page, "Keys in the ranks' store"))]
        for what, names, text in in_tables:
            for name in sorted(names):
                if f"`{name}" not in text:
                    yield f"{_place(path)} has the {what} {name!r}; add it to the table"


def main() -> int:
    """Print each problem; 1 if there is any."""
    page = _text(ARCHITECTURE)
    problems = [
        *undocumented(),
        *(f"{_place(ARCHITECTURE)}: {p}" for p in missing_in_architecture(page)),
    ]
    for path in sorted([ARCHITECTURE, *(EXPLANATION / "decisions").glob("*.md")]):
        problems += [f"{_place(path)}: {problem}" for problem in wrong_files(_text(path))]
    for problem in problems:
        print(problem)
    print(f"check_docs: {len(problems)} problems")
    return 1 if problems else 0


def _modules(sources: Iterable[Path]) -> list[Path]:
    return sorted(path for source in sources for path in source.rglob("*.py"))


def _literal(node: ast.expr) -> str:
    """A string, or the beginning of an f-string; "" for anything else."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return _literal(node.values[0])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@functools.cache
def _tree(source: str) -> ast.Module:
    return ast.parse(source)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


if __name__ == "__main__":
    sys.exit(main())
