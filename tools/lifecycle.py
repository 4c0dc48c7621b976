#!/usr/bin/env python3
"""Write docs/explanation/lifecycle.md from the docstring of callback.py, or check it.

    python tools/lifecycle.py [--check]

The docstring is the specification of the loop: a test of core asserts its order.
"""

import ast
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "packages/dream-trainer-core/src/dream_trainer/callbacks/callback.py"
PAGE = ROOT / "docs/explanation/lifecycle.md"


def page_of(docstring: str) -> str:
    """The docstring as a page: a title, and its literal block fenced."""
    first, _, rest = docstring.partition("\n")
    lines = ["# The loop, with each hook in its place", "", "<!-- made by tools/lifecycle.py -->"]
    lines += ["", first]
    block: list[str] = []
    for line in [*rest.splitlines(), "end"]:
        if line.startswith("    ") or (block and not line):
            block.append(line)
            continue
        if block:
            code = textwrap.dedent("\n".join(block)).strip("\n")
            lines += ["```text", code, "```", ""]
            block = []
        lines.append(line.removesuffix(":") if line.endswith("::") else line)
    return "\n".join(lines[:-1]).rstrip() + "\n"


def main() -> int:
    """Write the page; with --check, 1 if it would change."""
    docstring = ast.get_docstring(ast.parse(SOURCE.read_text(encoding="utf-8")))
    assert docstring is not None, f"{SOURCE} has no docstring"
    page = page_of(docstring)
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page:
        return 0
    print(f"{PAGE.relative_to(ROOT)} isn't what callback.py says: run python tools/lifecycle.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
