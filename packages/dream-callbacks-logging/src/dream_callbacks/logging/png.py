"""PNG and animated PNG from raw pixels, with the standard library only."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LEVEL = 3
"""zlib level; low, because compression may run on the training thread."""


@dataclass(frozen=True, slots=True)
class Frame:
    """An uncompressed 8-bit image.

    Args:
        width: Width in pixels.
        height: Height in pixels.
        channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA.
        pixels: Row-major, one byte per channel.
    """

    width: int
    height: int
    channels: int
    pixels: bytes

    @property
    def png(self) -> bytes:
        """The image as a PNG file."""
        data = _chunk(b"IDAT", _compressed(self))
        return _SIGNATURE + _header(self) + data + _chunk(b"IEND", b"")


def animated_png(frames: Sequence[Frame], fps: int) -> bytes:
    """Encode an animated PNG, which browsers play; other programs show the first frame.

    Args:
        frames: At least one, all of the same size.
        fps: Frames per second.
    """
    first = frames[0]
    chunks = [_SIGNATURE, _header(first), _chunk(b"acTL", struct.pack(">II", len(frames), 0))]
    sequence = 0
    for index, frame in enumerate(frames):
        control = struct.pack(
            ">IIIIIHHBB", sequence, frame.width, frame.height, 0, 0, 1, max(1, fps), 0, 0
        )
        chunks.append(_chunk(b"fcTL", control))
        sequence += 1
        if index == 0:
            chunks.append(_chunk(b"IDAT", _compressed(frame)))
        else:
            chunks.append(_chunk(b"fdAT", struct.pack(">I", sequence) + _compressed(frame)))
            sequence += 1
    return b"".join([*chunks, _chunk(b"IEND", b"")])


def _header(frame: Frame) -> bytes:
    color_type = _COLOR_TYPES[frame.channels]
    return _chunk(
        b"IHDR", struct.pack(">IIBBBBB", frame.width, frame.height, 8, color_type, 0, 0, 0)
    )


def _compressed(frame: Frame) -> bytes:
    num_bytes = frame.width * frame.channels
    rows = (
        b"\0" + frame.pixels[start : start + num_bytes]  # \0: no filter
        for start in range(0, num_bytes * frame.height, num_bytes)
    )
    return zlib.compress(b"".join(rows), _LEVEL)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
