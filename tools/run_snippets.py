"""Run the Python blocks of Markdown files.

The blocks of a file are one program, run in a fresh process in an empty folder; warnings are
errors. Line numbers in a traceback are those of the Markdown file. A block under the comment
`<!-- not run: reason -->` is left out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# torch's warning if numpy isn't installed has nothing to do with the snippet.
WARNINGS = ("-W", "error", "-W", "ignore:Failed to initialize NumPy:UserWarning")
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")


def program_of(markdown: str) -> str:
    """The Python blocks at their line numbers; all other lines are blank."""
    program = []
    fence: str | None = None  # the fence that closes the current block
    is_python = is_left_out = False
    for line in markdown.splitlines():
        opening = re.match(r"(`{3,})(\w*)", line)
        if fence is None and opening:
            fence = opening[1]
            is_python = opening[2] == "python" and not is_left_out
            is_left_out = False
            program.append("")
        elif fence is not None and line.rstrip() == fence:
            fence = None
            program.append("")
        elif fence is not None:
            program.append(line if is_python else "")
        else:
            if line.strip():
                is_left_out = NOT_RUN.search(line) is not None
            program.append("")
    return "\n".join(program).rstrip() + "\n"


def run(markdown: Path, timeout_s: float) -> bool:
    """Run one file's blocks with this interpreter; whether they succeeded."""
    program = program_of(markdown.read_text(encoding="utf-8"))
    if not program.strip():
        return True
    print(f"running the snippets of {markdown}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "snippet.py"
        script.write_text(program, encoding="utf-8")
        # With the Markdown file's name, so that a traceback points into it.
        code = (
            "from pathlib import Path\n"
            f"exec(compile(Path({str(script)!r}).read_text('utf-8'), {str(markdown)!r}, 'exec'))"
        )
        command = [sys.executable, *WARNINGS, "-c", code]
        done = subprocess.run(command, cwd=folder, timeout=timeout_s, check=False)
    return done.returncode == 0


def main() -> int:
    """Run the named files; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--timeout-s", type=float, default=120.0, help="for one file")
    arguments = parser.parse_args()
    failed = [f for f in arguments.files if not run(f.resolve(), arguments.timeout_s)]
    for file in failed:
        print(f"{file}: failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
