"""load_weights: load a checkpoint's weights into a plain module, without a trainer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dream_callbacks.checkpoint.catalog import (
    Catalog,
    choose_alone,
    directory_at,
    filesystem_at,
)
from dream_callbacks.checkpoint.errors import CheckpointError, DamagedCheckpointError
from dream_callbacks.checkpoint.format.state_codec import decode, tensor_names
from dream_callbacks.checkpoint.format.tensor_index import StoredTensor
from dream_callbacks.checkpoint.io.filesystem import below
from dream_callbacks.checkpoint.load_target import as_dict
from dream_callbacks.checkpoint.module_fit import (
    Weight,
    check_fit,
    check_meta,
    is_weight,
    keys_by_name,
    matching_values,
    tensor_name,
)
from dream_callbacks.checkpoint.restore import SavedState
from dream_callbacks.checkpoint.retention import Choice, ResumeMode, recorded_choice
from dream_callbacks.checkpoint.weights import PartialLoad

logger = logging.getLogger(__name__)


def load_weights(
    path: str | Path,
    module: nn.Module,
    which: ResumeMode = "best",
    *,
    model: str | None = None,
    strict: bool = True,
    monitor: str | None = None,
    mode: Literal["min", "max"] | None = None,
    verify: bool = True,
) -> PartialLoad:
    """Load the weights of a checkpoint into a module, without a trainer.

    Not collective: works in one process, without a process group, for checkpoints of any layout.
    Nothing is unpickled or written, and the run directory isn't locked: the run may still be
    training. The checkpoint is verified, and protected from deletion by runs on this machine.

    Weights are cast to the module's dtypes, on its devices. They are read into its tensors one by
    one, after names and shapes have been compared; from a URL, whose files aren't protected, into
    host memory first. Tensors on the meta device are replaced by ones on the CPU. Tied weights stay
    tied. Prefixes of DDP and `torch.compile` don't matter. `training` and `requires_grad` don't
    change.

    Args:
        path: A run directory, its folder of checkpoints, or one checkpoint; or a URL of one.
        module: A module like the one that was trained.
        which: "best", "last", "min", "max" or a step, as in `trainer.validate(checkpoint=…)`.
            Isn't used if `path` is a checkpoint.
        model: Name of the model in the trainer, such as "generator". Not needed if there is one.
        strict: Refuse names that are only in the module or only in the checkpoint. Shapes must
            match in any case.
        monitor: Metric of "best", "min" and "max". Default: that of the run's CheckpointCallback.
        mode: Whether "best" means low or high. Default: as in the run, if `monitor` is the run's.
        verify: Compare checksums before loading; otherwise only sizes.

    Returns:
        The checkpoint and what was loaded; names are those in the module.

    Raises:
        CheckpointError: If there is no such checkpoint, it is damaged, or it doesn't fit the
            module, which is unchanged. If a disk fails while tensors are read, the message says
            that the module has a part of the weights.
        ValueError: If `which` or `mode` isn't one of these values, or `path` is the checkpoint of
            another step.
        TypeError: If `module` isn't an `nn.Module`.
    """
    _check_arguments(path, module, which, mode)
    root, step = directory_at(path)
    if step is not None:
        if isinstance(which, int) and which != step:
            raise ValueError(
                f"which={which}, and {path} is the checkpoint of step {step}; leave which out, or "
                "give the run directory"
            )
        which = step
    filesystem = filesystem_at(root)

    def choice(catalog: Catalog) -> Choice:
        return recorded_choice(catalog, which, monitor, mode, "which")

    with contextlib.ExitStack() as held:
        checkpoint = choose_alone(filesystem, choice, verify=verify, held=held)
        if checkpoint is None:
            raise CheckpointError(f"there is no checkpoint in {filesystem} yet")
        place = below(root, checkpoint.name)
        if checkpoint.manifest.has_nan:
            logger.warning("%s has NaN in its weights", place)
        try:
            saved = SavedState(filesystem, checkpoint)
            plan = _planned(module, saved, _values_of(saved, model), place, strict=strict)
            _check_tied(plan, saved)
            plan.read(saved, in_place=filesystem.renames_at_once)
        except DamagedCheckpointError as error:
            raise CheckpointError(f"{place}: {error}") from error
    module.load_state_dict(plan.state, strict=strict, assign=plan.assigns)
    return plan.report


def _check_arguments(path: object, module: object, which: object, mode: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module is a {type(module).__name__}: an nn.Module is required, as in "
            "load_weights(run_dir, model)"
        )
    if not isinstance(path, (str, Path)):
        raise TypeError(
            f"path is a {type(path).__name__}: a path or URL is required, such as trainer.run_dir"
        )
    is_step = isinstance(which, int) and not isinstance(which, bool) and which >= 0
    if not is_step and which not in ("best", "last", "min", "max"):
        raise ValueError(f'which={which!r}: "best", "last", "min", "max" or a step is required')
    if mode not in ("min", "max", None):
        raise ValueError(f'mode={mode!r}: "min" or "max" is required')


def _values_of(saved: SavedState, model: str | None) -> dict[str, Any]:
    """JSON of a model's state dict, by key.

    Raises:
        CheckpointError: If there is no model of this name, or several and no name.
        DamagedCheckpointError: If it is malformed.
    """
    where = saved.checkpoint.name
    models = as_dict(saved.shared.get("models"))
    if not isinstance(models, dict):
        raise DamagedCheckpointError("it has no models")
    names = ", ".join(map(repr, models)) or "none"
    if model is None and len(models) > 1:
        raise CheckpointError(
            f"{where} has {len(models)} models: {names}; choose one, as in "
            f"model={next(iter(models))!r}"
        )
    values = as_dict(next(iter(models.values()), None) if model is None else models.get(model))
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{where} has no model{'' if model is None else f' {model!r}'}; its models: {names}"
        )
    if not all(isinstance(key, str) for key in values):
        raise DamagedCheckpointError("a name in a state dict isn't text")
    lost = [name for name in tensor_names(values) if name not in saved.index]
    if lost:
        raise DamagedCheckpointError(f"{lost[0]!r:.200} isn't in the index of tensors")
    return values


@dataclass
class _Plan:
    """What is read into which tensors.

    Attributes:
        state: State dict to load: the module's own tensors, or new ones in their places.
        targets: Tensors to read into, by name in the checkpoint.
        own: Names of those that are the module's.
        tied: Names in the checkpoint of each group of tied weights.
        extra: JSON of what isn't a parameter or buffer, by key of the module.
        assigns: Whether tensors of the module are replaced, since some are on the meta device.
        report: What is loaded.
    """

    state: dict[str, Any]
    targets: dict[str, Tensor]
    own: list[str]
    tied: list[list[str]]
    extra: dict[str, Any]
    assigns: bool
    report: PartialLoad

    def read(self, saved: SavedState, *, in_place: bool) -> None:
        """Read everything; the module's own tensors then have their values.

        Args:
            saved: The checkpoint.
            in_place: Read into the module's tensors; otherwise into copies first.
        """
        local = saved.local(0) if self.extra else {}
        extra = {name: saved.new_tensor(name) for name in tensor_names(self.extra)}
        saved.read(extra)
        self.state |= {key: decode(value, extra, local) for key, value in self.extra.items()}
        if not in_place:
            copies = {n: torch.empty_like(self.targets[n], device="cpu") for n in self.own}
            saved.read({**self.targets, **copies})
            for name in self.own:
                self.targets[name].copy_(copies.pop(name))
            return
        try:
            saved.read(self.targets)
        except (DamagedCheckpointError, OSError) as error:
            raise CheckpointError(
                f"{self.report.checkpoint} couldn't be read to the end: {error}; the module has a "
                "part of its weights now: load a checkpoint before it is used"
            ) from error


def _planned(
    module: nn.Module,
    saved: SavedState,
    values: Mapping[str, Any],
    place: str | Path,
    *,
    strict: bool,
) -> _Plan:
    """Compare a module with saved values, and make new tensors where it has none.

    Raises:
        CheckpointError: If they don't fit; it lists all differences.
    """
    state = module.state_dict(keep_vars=True)
    keys = keys_by_name(module, state)
    values = matching_values(keys, values)
    common = {name: key for name, key in keys.items() if name in values}
    extra = {key: values[name] for name, key in common.items() if not is_weight(key, state[key])}
    weights = [
        Weight(name, state[key], tensor_name(values[name]))
        for name, key in common.items()
        if key not in extra
    ]
    filled = {id(weight.tensor) for weight in weights}  # perhaps under another name
    missing = [n for n, key in keys.items() if n not in values and id(state[key]) not in filled]
    report = PartialLoad(
        place,
        loaded=tuple(sorted(keys.keys() - missing)),
        missing=tuple(sorted(missing)),
        unused=tuple(sorted(values.keys() - keys)),
        mismatched={},
    )
    check_fit(module, saved.index, weights, report, strict=strict)
    check_meta(module, filled)

    groups: dict[int, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(id(weight.tensor), []).append(weight)
    new = {
        i: _new_tensor(first.tensor, saved.index[first.source])
        for i, (first, *_) in groups.items()
        if first.tensor.is_meta or is_lazy(first.tensor)
    }
    for name in missing:
        del state[keys[name]]
    for key, value in state.items():
        state[key] = new.get(id(value), value)
    return _Plan(
        state,
        targets={g[0].source: new.get(i, g[0].tensor).detach() for i, g in groups.items()},
        own=[group[0].source for i, group in groups.items() if i not in new],
        tied=[[weight.source for weight in group] for group in groups.values() if len(group) > 1],
        extra=extra,
        assigns=any(weight.tensor.is_meta for weight in weights),
        report=report,
    )


def _check_tied(plan: _Plan, saved: SavedState) -> None:
    """Raise if weights that are tied in the module have different values in the checkpoint."""
    for names in plan.tied:
        tensors = {name: saved.new_tensor(name) for name in names}
        saved.read(tensors)
        first, *others = (tensor.flatten().view(torch.uint8) for tensor in tensors.values())
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError(
                f"{', '.join(names)} have different values in {plan.report.checkpoint}, and are "
                "one tensor in the module; build the module with separate weights"
            )


def _new_tensor(like: Tensor, stored: StoredTensor) -> Tensor:
    """A CPU tensor for a parameter or buffer on meta, or without a shape yet."""
    data = torch.empty(stored.shape, dtype=like.dtype, device="cpu")
    if isinstance(like, nn.Parameter) and not is_lazy(like):
        return nn.Parameter(data, requires_grad=like.requires_grad)
    return data
