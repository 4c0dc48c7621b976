"""Compare the weights of a module with those in a checkpoint: names, shapes, dtypes, devices."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dream_callbacks.checkpoint.errors import CheckpointError, listed
from dream_callbacks.checkpoint.format.tensor_index import TensorIndex
from dream_callbacks.checkpoint.weights import PartialLoad

_EXTRA_STATE = "_extra_state"
"""End of the key under which torch saves `nn.Module.get_extra_state()`."""

_COMPILED = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module)\.")
"""Prefixes of `torch.compile` and of activation checkpointing; no module has such a child."""


class Weight(NamedTuple):
    """A parameter or buffer of the module that the checkpoint has.

    Attributes:
        name: Its name, without the prefixes of wrappers.
        tensor: The module's.
        source: Name in the checkpoint; empty if it isn't a tensor there.
    """

    name: str
    tensor: Tensor
    source: str


def keys_by_name(module: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a module's state dict by their names without the prefixes of wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    wrapped = [
        f"{path}.module." if path else "module."
        for path, child in module.named_modules()
        if isinstance(child, wrappers)
    ]
    keys = {}
    for key in state:
        name = key
        for prefix in reversed(wrapped):  # inner ones first
            if name.startswith(prefix):
                name = prefix.removesuffix("module.") + name.removeprefix(prefix)
        keys[_COMPILED.sub("", name)] = key
    return keys


def matching_values(keys: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Saved values by name, without the prefixes of wrappers.

    A "module." before each saved key is that of DDP, unless names of the module have it too.
    """
    names = {key: _COMPILED.sub("", key) for key in values}
    prefix = "module."
    if all(name.startswith(prefix) for name in names.values()):
        if not any(name.startswith(prefix) for name in keys):
            names = {key: name.removeprefix(prefix) for key, name in names.items()}
    return {names[key]: value for key, value in values.items()}


def is_weight(key: str, value: Any) -> bool:
    """Whether a value of a state dict is a parameter or buffer."""
    return isinstance(value, Tensor) and not key.endswith(_EXTRA_STATE)


def tensor_name(value: Any) -> str:
    """Name in the checkpoint of a value that is a tensor; empty for others."""
    name = value.get("$tensor") if isinstance(value, dict) else None
    return name if isinstance(name, str) else ""


def check_fit(
    module: nn.Module,
    index: TensorIndex,
    weights: Sequence[Weight],
    report: PartialLoad,
    *,
    strict: bool,
) -> None:
    """Compare names, shapes and dtypes.

    Args:
        module: The module, for the error.
        index: Tensors of the checkpoint.
        weights: Parameters and buffers that are on both sides.
        report: Names that are on one side.
        strict: Refuse those.

    Raises:
        CheckpointError: If they don't fit; it lists all differences.
    """
    not_tensors = [weight.name for weight in weights if not weight.source]
    sources = {w.name: (w.tensor, index[w.source]) for w in weights if w.source}
    differences = [
        *listed("only in the checkpoint", list(report.unused) if strict else []),
        *listed("only in the module", list(report.missing) if strict else []),
        *listed("not a tensor in the checkpoint", not_tensors),
        *listed(
            "of another shape",
            [
                f"{name} {list(stored.shape)} → {list(here.shape)}"
                for name, (here, stored) in sources.items()
                if not is_lazy(here) and here.shape != stored.shape
            ],
        ),
        *listed(
            "of a dtype that can't be cast",
            [
                f"{name} {stored.dtype} → {here.dtype}"
                for name, (here, stored) in sources.items()
                if not torch.can_cast(stored.dtype, here.dtype)
            ],
        ),
    ]
    if not differences and not report.loaded and (report.missing or report.unused):
        differences = ["  no name is in both"]
    if differences:
        names_differ = strict and (report.missing or report.unused)
        hint = "; strict=False loads the names that are in both" if names_differ else ""
        raise CheckpointError(
            f"{report.checkpoint} doesn't fit the module, a {type(module).__name__}:\n"
            + "\n".join(differences)
            + f"\nBuild the module as it was trained{hint}"
        )


def check_meta(module: nn.Module, filled: Container[int]) -> None:
    """Check that nothing stays on the meta device, where tensors have no values.

    Args:
        module: The module.
        filled: `id` of the tensors that get values.

    Raises:
        CheckpointError: If a tensor would stay there, or is sharded.
    """
    from torch.distributed.tensor import DTensor

    buffers = module.named_buffers(remove_duplicate=False)
    tensors = [*module.named_parameters(remove_duplicate=False), *buffers]
    on_meta = [(name, tensor) for name, tensor in tensors if tensor.is_meta]
    sharded = [name for name, tensor in on_meta if isinstance(tensor, DTensor)]
    if sharded:
        raise CheckpointError(
            f"{sharded[0]} is sharded and on the meta device; call to_empty on the module before, "
            "and fill its non-persistent buffers"
        )
    left = [name for name, tensor in on_meta if id(tensor) not in filled]
    if left:
        raise CheckpointError(
            "tensors on the meta device would stay without values:\n"
            + "\n".join(listed("not in the checkpoint", left))
            + "\nNon-persistent buffers aren't saved. Build the module on a device, or give these "
            "tensors values before"
        )
