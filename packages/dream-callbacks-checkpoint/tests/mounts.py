"""Real file systems for tests: small, full, read-only, or on an image file."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

_CLONE_NEWNS = 0x00020000


def have_mounts_of_its_own() -> None:
    """Make later mounts private to this process; they end with it."""
    assert ctypes.CDLL(None).unshare(_CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def mount(kind: str, options: str, source: str | Path, folder: Path) -> None:
    """Mount a file system; with "remount,…" in `options`, one that is mounted already."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", kind, "-o", options, str(source), str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def new_image(path: Path, num_bytes: int) -> Path:
    """Create an image file with an empty file system."""
    with path.open("wb") as file:
        file.truncate(num_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True, capture_output=True)
    return path


def skip_unless_mountable(tmp_path: Path, kind: str) -> None:
    """Skip the test, with the reason, if such a file system can't be mounted here."""
    folder = tmp_path / "try"
    folder.mkdir()
    try:
        source = new_image(tmp_path / "try.img", 4 << 20) if kind == "ext4" else kind
        options = "loop" if kind == "ext4" else "size=1m"
        command = ["unshare", "--mount", "mount", "-t", kind, "-o", options]
        subprocess.run([*command, str(source), str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root, unshare and mounts of {kind}: {error}")
