"""Functions called in processes of their own, at the same time; how each ended.

python -m tools.gpu_parts.cases SPECIFICATION
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A call.

    Args:
        function: As "module:function" in `tools.gpu_parts`; its result must be JSON.
        arguments: Keyword arguments, as JSON.
        variables: Environment variables of the process.
    """

    function: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a case's process ended.

    Attributes:
        code: Exit code; negative for a signal; None if it was killed because of the time limit.
        seconds: From its start to its end.
        ended_at_s: Unix time in seconds.
        result: What the function returned; None if it didn't.
        output: All that was printed.
    """

    code: int | None
    seconds: float
    ended_at_s: float
    result: Any
    output: str

    @property
    def last_line(self) -> str:
        """The last line printed that isn't empty."""
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")

    def value(self) -> Any:
        """The result; prints the end of the output if there is none.

        Raises:
            RuntimeError: If the process failed.
        """
        if self.code != 0:
            print("\n".join(self.output.splitlines()[-25:]), flush=True)
            ended = "was stopped" if self.code is None else f"ended with {self.code}"
            raise RuntimeError(f"{ended} after {self.seconds:.0f} s: {self.last_line}")
        return self.result


def run_cases(cases: Mapping[str, Case], folder: Path, timeout_s: float) -> dict[str, Outcome]:
    """Run cases at the same time, one per core.

    Args:
        cases: By name.
        folder: For their files.
        timeout_s: Seconds for all of them; those that still run are killed then.
    """
    waiting = list(cases)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    outcomes: dict[str, Outcome] = {}
    give_up_s = time.monotonic() + timeout_s
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            name = waiting.pop(0)
            running[name] = _started(cases[name], folder / name), time.monotonic()
        time.sleep(0.02)
        is_over = time.monotonic() >= give_up_s
        for name, (process, began_s) in list(running.items()):
            code = process.poll()
            if code is not None or is_over:
                process.kill()
                process.wait()
                del running[name]
                outcomes[name] = _outcome(folder / name, code, time.monotonic() - began_s)
    return outcomes


def _started(case: Case, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True)
    specification = folder / "case.json"
    specification.write_text(json.dumps([case.function, dict(case.arguments)]))
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tools.gpu_parts.cases", str(specification)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **case.variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )


def _outcome(folder: Path, code: int | None, seconds: float) -> Outcome:
    output = (folder / "output").read_text(encoding="utf-8", errors="replace")
    result = folder / "result.json"
    value = json.loads(result.read_text()) if result.exists() else None
    return Outcome(code, seconds, time.time(), value, output)


def rank_variables(rank: int = 0, num_ranks: int = 1, port: int | None = None) -> dict[str, str]:
    """The environment variables of a rank without torchrun; a free port by default."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
    }


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main() -> None:
    """Call the function of a specification; an error leaves the process as it does a script."""
    specification = Path(sys.argv[1])
    name, arguments = json.loads(specification.read_text())
    module, function = name.split(":")
    result = getattr(importlib.import_module(f"tools.gpu_parts.{module}"), function)(**arguments)
    (specification.parent / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
