"""Keys under which results are logged."""

from __future__ import annotations

import re

_WORDS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}


def prefixed_key(group: str, key: str) -> str:
    """Prefix a key with its group, unless its first word already names the group.

    "loss" of training becomes "train/loss", "accuracy" of validation "val/accuracy"; "val_loss"
    is unchanged.

    Args:
        group: "train" or "val".
        key: Key in the step's result.
    """
    first_word = re.split(r"[/_.\- ]", key, maxsplit=1)[0].lower()
    return key if first_word in _WORDS[group] else f"{group}/{key}"
