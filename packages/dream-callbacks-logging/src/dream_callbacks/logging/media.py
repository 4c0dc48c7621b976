"""MediaLoggerCallback: logs images and videos returned by validation."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from dream_callbacks.logging.log_keys import evaluation_group, prefixed_key, set_prefix
from dream_trainer.callbacks import RankZeroCallback
from dream_trainer.trainer.mixins import LoggerMixin

logger = logging.getLogger(__name__)

_NUM_CHANNELS = (1, 3, 4)


class MediaLoggerCallback(RankZeroCallback[LoggerMixin]):
    """Logs images and videos from the result of `validation_step`, as `val/<key>`.

    Images are `(batch, channels, height, width)`, videos
    `(batch, time, channels, height, width)`, on global rank 0. Copies at most `max_items` to the
    host for each logged batch, and nothing for the others.

    Args:
        keys: Keys of the result to log. Default: each tensor with the shape of images or videos
            with 1, 3 or 4 channels.
        max_items: Maximum number of images or videos per batch.
        batches: Indices of the validation batches to log.
        every_n_validations: Log the first validation run and every n-th after it.
        value_range: Float values that map to black and white; others are clamped.
        captions_key: Key of the result that holds a caption for each image.
        fps: Frames per second of videos.

    Raises:
        ValueError: If a number is below 1, or `value_range` is empty.
    """

    def __init__(
        self,
        keys: Collection[str] | str | None = None,
        *,
        max_items: int = 8,
        batches: Collection[int] = (0,),
        every_n_validations: int = 1,
        value_range: tuple[float, float] = (0.0, 1.0),
        captions_key: str | None = None,
        fps: int = 8,
    ) -> None:
        for name, value in (
            ("max_items", max_items),
            ("every_n_validations", every_n_validations),
            ("fps", fps),
        ):
            if value < 1:
                raise ValueError(f"{name}={value!r}: at least 1 is required")
        if not value_range[0] < value_range[1]:
            raise ValueError(f"value_range={value_range!r}: (lowest, highest) is required")
        self.keys = (keys,) if isinstance(keys, str) else keys
        self.max_items = max_items
        self.batches = frozenset(batches)
        self.every_n_validations = every_n_validations
        self.value_range = value_range
        self.captions_key = captions_key
        self.fps = fps
        self._num_validations = 0
        self._has_warned = False

    def pre_fit(self) -> None:
        self._num_validations = 0

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        if self.trainer.running == "fit":
            self._num_validations += 1

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        trainer = self.trainer
        if (
            batch_idx not in self.batches
            or not trainer.sinks
            or trainer.is_sanity_validating
            or (trainer.running == "fit" and self._num_validations % self.every_n_validations)
        ):
            return
        captions = None if self.captions_key is None else result.get(self.captions_key)
        for key in self._found(result):
            # Several batches of a run share a step, so each gets its own name.
            name = prefixed_key(evaluation_group(trainer), f"{set_prefix(trainer)}{key}")
            name = name if len(self.batches) == 1 else f"{name}/batch_{batch_idx}"
            items = self._items(result[key])
            if _is_video(items):
                trainer.log_videos(name, items, fps=self.fps)
            else:
                texts = None if captions is None else _first(captions, self.max_items)
                trainer.log_images(name, items, captions=texts)

    def _found(self, result: dict[str, Any]) -> list[str]:
        if self.keys is None:
            return [key for key, value in result.items() if _is_media(value)]
        missing = [key for key in self.keys if key not in result]
        if missing and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "keys includes %s, but validation_step returned %s, so it isn't logged; return it "
                "from validation_step or change keys",
                ", ".join(missing),
                ", ".join(result) or "nothing",
            )
        return [key for key in self.keys if key in result]

    def _items(self, value: Any) -> Any:
        items = _first(value, self.max_items)
        if isinstance(items, Tensor) and items.is_floating_point():
            lowest, highest = self.value_range
            items = ((items.float() - lowest) / (highest - lowest)).clamp(0.0, 1.0)
        return items


def _first(value: Any, num_items: int) -> Any:
    return value[:num_items] if isinstance(value, (Tensor, Sequence)) else value


def _is_media(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() in (4, 5)
        and value.shape[-3] in _NUM_CHANNELS
        and min(value.shape[-2:]) > 1
        and (value.is_floating_point() or value.dtype in (torch.uint8, torch.bool))
    )


def _is_video(items: Any) -> bool:
    if isinstance(items, Tensor):
        return items.dim() == 5
    return (
        isinstance(items, Sequence)
        and bool(items)
        and isinstance(items[0], Tensor)
        and (items[0].dim() == 4)
    )
