"""Virtual environments, made once and again only if their requirements changed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    windows = environment / "Scripts" / "python.exe"
    return windows if windows.exists() else environment / "bin" / "python"


def torch_pin(constraints: Path = CONSTRAINTS) -> str:
    """The pinned requirement of torch, such as `torch==2.13.0`.

    Raises:
        ValueError: If the constraints have no such line.
    """
    for line in constraints.read_text(encoding="utf-8").splitlines():
        if line.startswith("torch=="):
            return line.strip()
    raise ValueError(f"{constraints} has no line torch==…; the pin of torch belongs there")


def fingerprint(words: Iterable[str], files: Iterable[Path] = ()) -> str:
    """A digest of words, and of paths and contents of files."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(word.encode() + b"\0")
    for file in files:
        digest.update(str(file).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


class Environment:
    """A virtual environment with a stamp of what is installed.

    Args:
        path: Its folder.
        below: An environment whose packages this one sees too, after its own; for example one with
            torch, so that torch is installed only once.
    """

    def __init__(self, path: Path, below: Environment | None = None) -> None:
        self.path = path
        self._below = below

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return python_of(self.path)

    def site_packages(self) -> Path:
        """The folder of its packages."""
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        command = [str(self.python), "-c", query]
        return Path(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        )

    def has(self, stamp: str, part: str = "all") -> bool:
        """Whether `part` was last completed with this stamp."""
        file = self._stamp_file(part)
        return self.python.exists() and file.is_file() and file.read_text() == stamp

    def mark(self, stamp: str, part: str = "all") -> None:
        """Record that `part` is complete."""
        self._stamp_file(part).write_text(stamp)

    def create(self) -> None:
        """Make it again, empty."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        options = [] if self._below is None else ["--without-pip"]
        subprocess.run([sys.executable, "-m", "venv", *options, str(self.path)], check=True)
        if self._below is not None:
            layer = self.site_packages() / "layer.pth"
            layer.write_text(f"{self._below.site_packages()}\n")

    def install(self, *arguments: str, constraints: Path = CONSTRAINTS) -> None:
        """`pip install` into it, under the repository's constraints.

        Raises:
            subprocess.CalledProcessError: If pip fails; it has printed why.
        """
        quiet = ["-qq", "--disable-pip-version-check"]  # errors only
        pip = [str(self.python), "-m", "pip", "install", *quiet, "-c", str(constraints)]
        subprocess.run([*pip, *arguments], check=True, cwd=ROOT)

    def _stamp_file(self, part: str) -> Path:
        return self.path / f"installed-{part}"
