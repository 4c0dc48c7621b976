"""Part: what one part of `tools/gpu` checks and finds. Also runs a part, in a process of its own.

python -m tools.gpu_parts.part MODULE FOLDER FILE [--quick]
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "measured", "not run"]


class Part:
    """Records checks in a file, each as soon as it is known: a part may be stopped at any time.

    Args:
        file: JSON lines: name, status, and what was expected and found.
        folder: Empty, for files of the part.
        on_gpu: Whether there is a GPU; else the part checks itself on the CPU, with small sizes.
        quick: Small sizes on a GPU too.
    """

    def __init__(self, file: Path, folder: Path, *, on_gpu: bool, quick: bool) -> None:
        self.folder = folder
        self.on_gpu = on_gpu
        self.device: Literal["cpu", "cuda"] = "cuda" if on_gpu else "cpu"
        self.is_small = quick or not on_gpu
        self._file = file

    def size(self, full: int, small: int) -> int:
        """A size on a GPU, and the one for a quick run or on the CPU."""
        return small if self.is_small else full

    def expect(self, name: str, passed: bool, found: Any, expected: str) -> None:
        """Record a check.

        Args:
            name: What is checked.
            passed: Whether it holds.
            found: Numbers or text.
            expected: In words, with numbers and units.
        """
        self._record(name, "passed" if passed else "failed", found, expected)

    def measured(self, name: str, found: Any) -> None:
        """Record a figure that nothing is expected of."""
        self._record(name, "measured", found)

    def not_run(self, name: str, reason: str) -> None:
        """Record that a check wasn't run, and why."""
        self._record(name, "not run", reason)

    def needs_gpu(self, name: str) -> bool:
        """Whether there is a GPU; without one, the check is recorded as not run."""
        if not self.on_gpu:
            self.not_run(name, "no GPU")
        return self.on_gpu

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Inside, an error is a failed check, and the part goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # whatever a check runs into
            traceback.print_exc()
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            self._record(name, "failed", text, "no error")

    def _record(self, name: str, status: Status, found: Any, expected: str | None = None) -> None:
        record = {"name": name, "status": status, "expected": expected, "found": found}
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, default=str) + "\n")
        print(f"[{status}] {name}: {found}", flush=True)


def main() -> None:
    """Run the part that the command line names."""
    import torch

    module, folder, file, *options = sys.argv[1:]
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(1)  # on a busy machine, several wait for each other
    with tempfile.TemporaryDirectory(dir=folder) as own:
        part = Part(Path(file), Path(own), on_gpu=on_gpu, quick="--quick" in options)
        importlib.import_module(module).run(part)


if __name__ == "__main__":
    main()
