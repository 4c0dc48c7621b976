"""Which tensors a checkpoint is loaded into, and how it differs from a trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_callbacks.checkpoint.errors import DamagedCheckpointError, listed
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.state_codec import EncodedState, tensor_names

if TYPE_CHECKING:
    from dream_callbacks.checkpoint.restore import SavedState

_IN_PLACE = ("models", "optimizers")
"""Sections whose tensors are loaded in place, where the trainer has them."""


def matched(saved: SavedState, live: EncodedState) -> tuple[dict[str, Tensor], list[str]]:
    """Live tensors of models to load in place, and the differences."""
    here = {n: t for n, t in live.tensors.items() if n.split(".", 1)[0] == "models"}
    there = set(tensor_names(saved.shared["models"]))
    index = saved.index
    wrong_shape = [n for n in here if n in there and index[n].shape != here[n].shape]
    wrong_dtype = [n for n in here if n in there and index[n].dtype != here[n].dtype]
    saved_groups, live_groups = _group_names(saved.shared, live.shared)
    differences = [
        *listed("only in the checkpoint", sorted((there - set(here)) | saved_groups)),
        *listed("only in the trainer", sorted((set(here) - there) | live_groups)),
        *listed(
            "of another shape",
            [f"{n} {list(index[n].shape)} → {list(here[n].shape)}" for n in wrong_shape],
        ),
        *listed(
            "of another dtype", [f"{n} {index[n].dtype} → {here[n].dtype}" for n in wrong_dtype]
        ),
    ]
    loadable = {n: t for n, t in here.items() if n in there and n not in set(wrong_shape)}
    return loadable, differences


def _group_names(saved: Mapping[str, Any], live: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Parameters and options of optimizers that only one side has.

    The state of an optimizer doesn't tell: it has none before its first step. Options differ only
    if each side has some that the other lacks: another class, and not one of another version.
    """
    only: tuple[set[str], set[str]] = set(), set()
    for name, optimizer in saved["optimizers"].items():
        here = live["optimizers"].get(name)
        if here is None or not optimizer["param_groups"] or not here["param_groups"]:
            continue
        pairs = [_parameters_and_options(name, part) for part in (optimizer, here)]
        (saved_params, saved_options), (params, options) = pairs
        only[0].update(saved_params - params)
        only[1].update(params - saved_params)
        if saved_options - options and options - saved_options:
            only[0].update(saved_options - options)
            only[1].update(options - saved_options)
    return only


def _parameters_and_options(name: str, optimizer: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    groups = [as_dict(group) for group in optimizer["param_groups"]]
    place = f"optimizers.{name}"
    parameters = {f"{place}.state.{fqn}" for group in groups for fqn in group["params"]}
    options = {f"{place}.param_groups.{key}" for group in groups for key in group}
    return parameters, options - {f"{place}.param_groups.initial_lr"}  # a scheduler's


def optimizer_tensors(saved: SavedState, live: EncodedState) -> dict[str, Tensor]:
    """Tensors for the state of optimizers: live ones that fit, new ones otherwise.

    A tensor of its parameter's shape is sharded like the parameter; others are replicated.
    """
    return {
        key: tensor
        for name, optimizer in saved.shared["optimizers"].items()
        if name in live.shared["optimizers"]
        for key, tensor in _state_tensors(saved, live, optimizer)
    }


def _state_tensors(
    saved: SavedState, live: EncodedState, optimizer: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    options = [(None, name) for name in tensor_names(optimizer["param_groups"])]
    states = [
        (live.tensors.get(_parameter_name(fqn, live) or ""), name)
        for fqn, state in optimizer["state"].items()
        for name in tensor_names(state)
    ]
    for parameter, name in (*options, *states):
        stored, here = saved.index[name], live.tensors.get(name)
        if here is not None and (here.shape, here.dtype) == (stored.shape, stored.dtype):
            yield name, here
        elif parameter is not None and stored.shape == parameter.shape:
            yield name, torch.empty_like(parameter, dtype=stored.dtype)
        else:
            yield name, saved.new_tensor(name)
    for wrapped in optimizer.get("wrapped", {}).values():
        yield from _state_tensors(saved, live, wrapped)


def _parameter_name(fqn: str, live: EncodedState) -> str | None:
    """Name of the live parameter of an optimizer; `models.<fqn>` first, then each model."""
    names = [f"models.{fqn}", *(f"models.{model}.{fqn}" for model in live.shared["models"])]
    return next((name for name in names if name in live.tensors), None)


def own_tensors(
    saved: SavedState, local: Mapping[str, Any], live: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """New tensors for everything except models and optimizers.

    They are sharded like a live tensor of the same name and shape, otherwise unsharded.
    """
    sections = [part for key, part in saved.shared.items() if key not in _IN_PLACE]
    names = {name for part in [*sections, dict(local)] for name in tensor_names(part)}
    fresh = {}
    for name in names:
        like = live.get(name)
        fits = like is not None and like.shape == saved.index[name].shape
        fresh[name] = torch.empty_like(like) if fits else saved.new_tensor(name)  # type: ignore[arg-type]
    return fresh


def _overlaid(live: Any, saved: Any) -> Any:
    """Saved values where keys match, live values elsewhere."""
    live, saved = as_dict(live), as_dict(saved)
    if not isinstance(live, dict) or not isinstance(saved, dict):
        return saved
    if "$tensor" in live or any(key.startswith("$") for key in (*live, *saved)):
        return live
    return {k: _overlaid(value, saved[k]) if k in saved else value for k, value in live.items()}


def fitting(saved: SavedState, live: EncodedState) -> dict[str, Any]:
    """What fits of models and optimizers that differ, with live values elsewhere.

    Of optimizers: saved states of the parameters that have the same shape, and live groups if these
    have other parameters.
    """
    optimizers = dict(live.shared["optimizers"])
    for name, here in optimizers.items():
        before = saved.shared["optimizers"].get(name)
        if before is not None and before["param_groups"] and here["param_groups"]:
            state = {k: v for k, v in before["state"].items() if _has_same_shape(k, saved, live)}
            source = before if _members(before) == _members(here) else here
            groups = source["param_groups"]
            optimizers[name] = {**before, "state": state, "param_groups": groups}
    models = _overlaid(live.shared["models"], saved.shared["models"])
    return {"models": models, "optimizers": optimizers}


def _has_same_shape(fqn: str, saved: SavedState, live: EncodedState) -> bool:
    name = _parameter_name(fqn, live)
    there = set(tensor_names(saved.shared["models"]))
    return name in there and saved.index[name].shape == live.tensors[name].shape


def as_dict(document: Any) -> Any:
    """A dict of `state.json` without its tag; another value as it is."""
    if isinstance(document, dict) and "$ordered_dict" in document:
        try:
            return dict(document["$ordered_dict"])
        except (TypeError, ValueError) as error:
            raise DamagedCheckpointError(f"{file_names.STATE}: {error!r:.200}") from error
    return document


def _members(optimizer: Mapping[str, Any]) -> list[Any]:
    return [as_dict(group).get("params") for group in optimizer["param_groups"]]
