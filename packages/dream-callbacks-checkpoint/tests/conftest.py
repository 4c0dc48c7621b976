"""Makes the helper modules importable; tests run in tmp_path and must restore signal handlers."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _signals_restored() -> Iterator[None]:
    before = [signal.getsignal(number) for number in _SIGNALS]
    yield
    assert [signal.getsignal(number) for number in _SIGNALS] == before


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a block device, and one on a file system without."""
    if request.param == "disk":
        skip_unless_on_disk(tmp_path)
        yield tmp_path
        return
    if not Path("/dev/shm").is_dir() or os.major(Path("/dev/shm").stat().st_dev) != 0:
        pytest.skip("needs a tmpfs at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder on a block device."""
    skip_unless_on_disk(tmp_path)
    return tmp_path


def skip_unless_on_disk(folder: Path) -> None:
    if os.major(folder.stat().st_dev) == 0:
        pytest.skip("the temporary folder isn't on a block device")
