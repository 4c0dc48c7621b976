"""Conversion of tensors, arrays, PIL images and figures to frames and PNG for the sinks."""

from __future__ import annotations

import ctypes
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dream_callbacks.logging.png import Frame

logger = logging.getLogger(__name__)

_NUM_CHANNELS = (1, 2, 3, 4)


def image_frames(images: Any) -> list[Frame]:
    """Convert images to frames. Device tensors cost a device sync. Never raises.

    Args:
        images: Frames; a tensor or array `(batch, channels, height, width)` or
            `(batch, height, width, channels)`, or one image with fewer dimensions; PIL images;
            or a list of any of these. Floats are from 0 to 1, integers from 0 to 255.

    Returns:
        The frames; an empty list, with a warning in the log, if `images` isn't valid.
    """
    try:
        return list(_images(images))
    except (TypeError, ValueError, RuntimeError) as error:
        logger.warning("images are left out: %s", error)
        return []


def video_frames(videos: Any) -> list[list[Frame]]:
    """Convert videos to lists of frames. Device tensors cost a device sync. Never raises.

    Args:
        videos: A tensor or array `(batch, time, channels, height, width)`, one video without
            `batch`, or a list of lists of images.

    Returns:
        The videos; an empty list, with a warning in the log, if `videos` isn't valid.
    """
    try:
        return [frames for frames in _videos(videos) if frames]
    except (TypeError, ValueError, RuntimeError) as error:
        logger.warning("videos are left out: %s", error)
        return []


def figure_png(figure: Any) -> bytes:
    """Render a matplotlib figure, or any object with its `savefig`, as PNG. Never raises.

    Returns:
        The PNG file; empty, with a warning in the log, if rendering fails.
    """
    if isinstance(figure, bytes):
        return figure
    try:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()
    except Exception as error:  # noqa: BLE001  # drawing runs user code, and a failed plot must not end the run
        logger.warning("a plot is left out: %r", error)
        return b""


def _images(images: Any) -> Iterator[Frame]:
    if isinstance(images, Frame):
        yield images
    elif isinstance(images, (list, tuple)):
        for image in images:
            yield from _images(image)
    elif _is_pil(images):
        rgb = images.convert("RGBA" if "A" in images.getbands() else "RGB")
        yield Frame(rgb.width, rgb.height, len(rgb.getbands()), rgb.tobytes())
    else:
        pixels = _as_bytes(images)
        if pixels.dim() == 2 or (pixels.dim() == 3 and _channels_dim(pixels) is not None):
            pixels = pixels.unsqueeze(0)
        if pixels.dim() == 3:
            pixels = pixels.unsqueeze(1)
        if pixels.dim() != 4:
            raise ValueError(
                f"a tensor of shape {tuple(pixels.shape)} isn't a batch of images; "
                "(batch, channels, height, width) is required"
            )
        for image in pixels:
            yield _frame(image)


def _videos(videos: Any) -> Iterator[list[Frame]]:
    if isinstance(videos, (list, tuple)):
        for video in videos:
            is_frames = isinstance(video, (list, tuple))
            yield from ([list(_images(video))] if is_frames else _videos(video))
        return
    pixels = _as_bytes(videos)
    if pixels.dim() == 4:
        pixels = pixels.unsqueeze(0)
    if pixels.dim() != 5:
        raise ValueError(
            f"a tensor of shape {tuple(pixels.shape)} isn't a batch of videos; "
            "(batch, time, channels, height, width) is required"
        )
    for video in pixels:
        yield [_frame(image) for image in video]


def _frame(image: Tensor) -> Frame:
    """A frame from `(channels, height, width)` or `(height, width, channels)`."""
    dim = 0 if image.dim() == 2 else _channels_dim(image)
    if dim is None:
        raise ValueError(
            f"a tensor of shape {tuple(image.shape)} isn't an image; 1 to 4 channels are required, "
            "as in (channels, height, width)"
        )
    rows = (image.movedim(0, -1) if dim == 0 else image).contiguous()  # (H, W, C)
    height, width, channels = rows.shape
    if not rows.numel():
        raise ValueError(f"an image of shape {tuple(image.shape)} has no pixels")
    # Not through numpy, which may not be installed.
    pixels = ctypes.string_at(rows.data_ptr(), rows.numel())
    return Frame(width, height, channels, pixels)


def _channels_dim(image: Tensor) -> int | None:
    if image.shape[0] in _NUM_CHANNELS:
        return 0
    return 2 if image.shape[2] in _NUM_CHANNELS else None


def _as_bytes(values: Any) -> Tensor:
    """Convert pixel values to uint8 on the CPU; floats from 0 to 1 become 0 to 255."""
    tensor = torch.as_tensor(values).detach()
    if tensor.dtype is torch.uint8:
        return tensor.cpu().clone()
    if tensor.is_complex():
        raise TypeError("complex values aren't pixels; log their abs()")
    if tensor.dtype is torch.bool:
        tensor = tensor.float()
    if tensor.is_floating_point():
        tensor = tensor.float().nan_to_num(0.0, 1.0, 0.0).mul(255.0).round()
    return tensor.clamp(0, 255).to(torch.uint8).cpu()


def _is_pil(value: Any) -> bool:
    pil = sys.modules.get("PIL.Image")  # never imported: `value` can't be a PIL image
    return pil is not None and isinstance(value, pil.Image)
