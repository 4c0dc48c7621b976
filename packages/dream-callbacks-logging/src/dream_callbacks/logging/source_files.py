"""Source files of a run: selecting and archiving them."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = frozenset({".py", ".pyi", ".yaml", ".yml", ".toml", ".json", ".cfg", ".ini", ".sh"})
"""Suffixes of code and config files."""

_NAMES = frozenset({"Dockerfile", "Makefile", "requirements.txt", "constraints.txt"})
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "node_modules", "site-packages", "venv", "wandb", "runs", "build", "dist"}
)
_MAX_FILE_BYTES = 1_000_000
_MAX_TOTAL_BYTES = 20_000_000


@dataclass(frozen=True)
class SourceFiles:
    """The selected files below a directory.

    Args:
        directory: The directory that was searched.
        paths: Selected files, relative to `directory`, sorted.
        too_large: Files left out because of their size.
    """

    directory: Path
    paths: tuple[str, ...]
    too_large: tuple[str, ...]

    def archive(self) -> bytes:
        """A zip of the files; deterministic for the same contents."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in self.paths:
                try:
                    content = (self.directory / path).read_bytes()
                except OSError:
                    continue  # deleted since it was listed
                archive.writestr(zipfile.ZipInfo(path), content, zipfile.ZIP_DEFLATED)
        return buffer.getvalue()


def source_files(directory: Path, *, leave_out: Path | None = None) -> SourceFiles:
    """Select small code and config files below a directory, skipping virtual environments.

    Args:
        directory: The directory to search; links aren't followed.
        leave_out: A directory to skip, such as the run directory.
    """
    taken: list[str] = []
    too_large: list[str] = []
    total = 0
    for path in sorted(_candidates(directory, leave_out)):
        size = (directory / path).lstat().st_size
        if size > _MAX_FILE_BYTES or total + size > _MAX_TOTAL_BYTES:
            too_large.append(path)
        else:
            total += size
            taken.append(path)
    return SourceFiles(directory, tuple(taken), tuple(too_large))


def short_digest(content: bytes) -> str:
    """The first 12 hexadecimal digits of the content's SHA-256."""
    return hashlib.sha256(content).hexdigest()[:12]


def _candidates(directory: Path, leave_out: Path | None) -> Iterator[str]:
    for folder, subfolders, names in os.walk(directory):
        here = Path(folder)
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS
            and not name.startswith(".")
            and not (here / name / "pyvenv.cfg").exists()
            and (leave_out is None or (here / name).resolve() != leave_out.resolve())
        ]
        for name in names:
            path = here / name
            if (path.suffix in SUFFIXES or name in _NAMES) and path.is_file():
                if not path.is_symlink():
                    yield path.relative_to(directory).as_posix()
