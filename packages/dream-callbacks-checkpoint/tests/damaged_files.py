"""Damage to the files of a checkpoint, with and without a manifest that matches it."""

from __future__ import annotations

import zlib
from pathlib import Path

from dream_callbacks.checkpoint.format.manifest import sealed, unsealed


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir())


def damage(file: Path) -> None:
    """Flip a bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def reseal(folder: Path) -> None:
    """Update the manifest to the sizes and checksums of the files."""
    path = folder / "MANIFEST.json"
    document = unsealed(path.read_bytes())
    document["files"] = {
        file.name: [file.stat().st_size, zlib.crc32(file.read_bytes())]
        for file in files_of(folder)
        if file.name != "MANIFEST.json"
    }
    path.write_bytes(sealed(document))
