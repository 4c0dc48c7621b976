"""Keys under which results are logged."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dream_trainer.trainer import AbstractTrainer

_WORDS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation"},
    "test": {"test", "testing"},
}


def prefixed_key(group: str, key: str) -> str:
    """Prefix a key with its group, unless its first word already names the group.

    "loss" of training becomes "train/loss", "accuracy" of validation "val/accuracy"; "val_loss"
    is unchanged.

    Args:
        group: "train", "val" or "test".
        key: Key in the step's result.
    """
    first_word = re.split(r"[/_.\- ]", key, maxsplit=1)[0].lower()
    return key if first_word in _WORDS[group] else f"{group}/{key}"


def evaluation_group(trainer: AbstractTrainer) -> str:
    """The group of what is being evaluated: "test" in `trainer.test`, else "val"."""
    return "test" if trainer.running == "test" else "val"


def set_prefix(trainer: AbstractTrainer) -> str:
    """What the result of an epoch puts before the keys of the set that is being evaluated."""
    return f"{trainer.validation_set}/" if trainer.validation_set else ""
