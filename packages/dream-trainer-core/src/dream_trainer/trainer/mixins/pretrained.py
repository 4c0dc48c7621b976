"""Errors of `from_pretrained` inside a device context, explained.

Hugging Face's `from_pretrained` asks for the current device context: it refuses meta, and needs
accelerate for any other device than the CPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ON_META = (
    "configure_models calls from_pretrained on the meta device, which holds no values: the model "
    "will be sharded, and there is an init_weights. Build the model without weights, by "
    "from_config or its class, and load them in init_weights: set_model_state_dict(self.model, "
    "pretrained.state_dict(), options=StateDictOptions(full_state_dict=True)), from "
    "torch.distributed.checkpoint.state_dict. Without init_weights, each rank loads the whole "
    "model to its device before it is sharded"
)

_ON_DEVICE = (
    "configure_models calls from_pretrained on {}, which needs accelerate there: pip install "
    "accelerate, or load to the CPU, from where the trainer moves the model to the device: "
    'with torch.device("cpu"): self.model = ….from_pretrained(…)'
)


@contextmanager
def explained(device: torch.device) -> Iterator[None]:
    """Say what to write if `from_pretrained` fails inside because of the device.

    Args:
        device: The device context that it runs in.

    Raises:
        RuntimeError: From the error of `from_pretrained`.
    """
    try:
        yield
    except (RuntimeError, ValueError, ImportError) as error:
        cause = "meta" if device.type == "meta" else "accelerate"
        names = (frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__))
        if cause not in str(error) or "from_pretrained" not in names:
            raise
        raise RuntimeError(_ON_META if cause == "meta" else _ON_DEVICE.format(device)) from error
