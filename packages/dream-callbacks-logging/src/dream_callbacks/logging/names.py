"""Names under which results are logged."""

from __future__ import annotations

import re

_WORDS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}


def named_under(group: str, key: str) -> str:
    """The key below a group, unless it says itself what it belongs to.

    "loss" of training becomes "train/loss", "accuracy" of validation "val/accuracy"; "val_loss"
    stays as it is.

    Args:
        group: "train" or "val".
        key: As the step returned it.
    """
    first_word = re.split(r"[/_.\- ]", key, maxsplit=1)[0].lower()
    return key if first_word in _WORDS[group] else f"{group}/{key}"
