"""State of a trainer: saving and loading. Checkpoints depend on its layout.

::

    {
      "trainer": {
        "counters", "callbacks", "random_state", "epoch_means", "train_metrics", "monitored"
      },
      "models": {name: tensors by parameter name},
      "optimizers": {name: states by parameter name, param_groups},
      "schedulers": {name: state},
      "dataloaders": {"train": position},
    }

Tensors of models and optimizers aren't copied; they are sharded where the model is. Values that
differ per rank (`random_state`, `epoch_means`, `train_metrics`, `dataloaders`) are wrapped in
RankLocal. `train_metrics`, and `monitored`, the values that schedulers will be stepped by at the
end of the epoch, are left out if there are none. If there are gradients that no step has used,
"trainer" has "gradients" {model: tensors by parameter name} and "denominators"; with float16,
"loss_scale".
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dream_trainer.callbacks.plain_data import RankLocal, without_rank_local
from dream_trainer.trainer import pending_gradients
from dream_trainer.trainer.optimizer_state import load_optimizer_state, optimizer_state
from dream_trainer.world.determinism import random_state

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

logger = logging.getLogger(__name__)


def state_dict(trainer: BaseTrainer, *, as_target: bool = False) -> dict[str, Any]:
    """The state of a trainer. Collective where models are sharded.

    Args:
        trainer: Set up.
        as_target: With the groups of optimizers that haven't stepped yet, to compare them with
            those of a saved state.
    """
    metrics, loss_scale = trainer.train_metrics_state_dict(), trainer.optimization.loss_scale
    monitored = trainer.epoch_schedules.state_dict()
    return {
        "trainer": {
            "counters": dataclasses.asdict(trainer.counters),
            "callbacks": _states_of_callbacks(trainer),
            "random_state": RankLocal(random_state()),
            "epoch_means": RankLocal(trainer.epoch_means.state_dict()),
            **({"train_metrics": RankLocal(metrics)} if metrics else {}),
            **({"monitored": monitored} if monitored else {}),
            **pending_gradients.state_dict(trainer.optimization.groups),
            **({"loss_scale": loss_scale.state_dict()} if loss_scale is not None else {}),
        },
        "models": trainer.model_state_dict(),
        "optimizers": {
            name: _optimizer_state(trainer, name, as_target=as_target)
            for name in trainer.named_optimizers()
        },
        "schedulers": {
            name: scheduler.state_dict() for name, scheduler in trainer.named_schedulers().items()
        },
        "dataloaders": {"train": RankLocal(trainer.train_batches.state_dict())},
    }


def load_state_dict(
    trainer: BaseTrainer,
    state: Mapping[str, Any],
    *,
    strict: bool = True,
    resume_data: bool = True,
) -> None:
    """Continue from a state. Collective where models are sharded.

    Args:
        trainer: Set up.
        state: What `state_dict` returned, from any layout; RankLocal values may be bare.
        strict: Raise if names of models, optimizers, schedulers or parameters don't match.
        resume_data: Continue at the next batch; otherwise restart the current epoch.

    Raises:
        KeyError: If `strict` and names don't match; it lists both sides.
    """
    state = without_rank_local(state)
    _match_names("models", trainer.named_models(), state["models"], strict)
    _match_names("optimizers", trainer.named_optimizers(), state["optimizers"], strict)
    _match_names("schedulers", trainer.named_schedulers(), state["schedulers"], strict)
    _load_models(trainer, state["models"], strict=strict)
    _load_optimizers(trainer, state["optimizers"])
    for name, scheduler in trainer.named_schedulers().items():
        if name in state["schedulers"]:
            scheduler.load_state_dict(state["schedulers"][name])
    own = state["trainer"]
    trainer.epoch_schedules.load_state_dict(own.get("monitored", {}))
    for name, value in own["counters"].items():
        setattr(trainer.counters, name, value)
    trainer.callbacks.load_state_dict(own["callbacks"], trainer)
    trainer.callback_states_to_resume = None
    if trainer.optimization.loss_scale is not None and "loss_scale" in own:
        trainer.optimization.loss_scale.load_state_dict(own["loss_scale"])
    pending_gradients.load_state_dict(trainer.optimization.groups, own if resume_data else {})
    if resume_data:
        trainer.train_batches.load_state_dict(state["dataloaders"].get("train", {}))
        trainer.epoch_means.load_state_dict(own.get("epoch_means", {}))
        trainer.load_train_metrics_state_dict(own.get("train_metrics", {}))
    else:
        trainer.counters.epoch_batches = 0
    # Restored when training continues, so random numbers drawn until then have no effect.
    trainer.random_state_to_resume = own.get("random_state")


@contextmanager
def training_state_kept(trainer: BaseTrainer) -> Iterator[None]:
    """Inside, hooks of validation run, and training continues as if they hadn't. Collective.

    They may step a ReduceLROnPlateau or count towards an early stop. Schedulers and the options of
    parameter groups are restored at the end. Callbacks keep their state, to be read and shown;
    what is saved is their state before, which the next `fit` begins with. Tensors of models and
    optimizers aren't covered.
    """
    callbacks = _snapshot(_states_of_callbacks(trainer))
    validated_step = trainer.counters.validated_step
    schedulers = {
        name: copy.deepcopy(scheduler.state_dict())
        for name, scheduler in trainer.named_schedulers().items()
    }
    options = {
        name: [_options(group) for group in optimizer.param_groups]
        for name, optimizer in trainer.named_optimizers().items()
    }
    try:
        yield
    finally:
        trainer.counters.validated_step = validated_step
        for name, scheduler in trainer.named_schedulers().items():
            scheduler.load_state_dict(schedulers[name])
        for name, optimizer in trainer.named_optimizers().items():
            for group, before in zip(optimizer.param_groups, options[name], strict=True):
                _restore_options(group, before)
    if not _are_equal(trainer.callbacks.state_dict(), callbacks):
        trainer.callback_states_to_resume = callbacks


def resume_callbacks(trainer: BaseTrainer) -> None:
    """Give callbacks the state that was kept for them, if any."""
    states, trainer.callback_states_to_resume = trainer.callback_states_to_resume, None
    if states is not None:
        trainer.callbacks.load_state_dict(states, trainer)


def _states_of_callbacks(trainer: BaseTrainer) -> dict[str, Any]:
    kept = trainer.callback_states_to_resume
    return trainer.callbacks.state_dict() if kept is None else _snapshot(kept)


_LARGEST_COPIED = 2**20
"""Elements of a tensor up to which a snapshot has a copy; larger ones are taken to be weights."""


def _snapshot(value: Any) -> Any:
    """A copy of plain data; large and sharded tensors aren't copied."""
    if isinstance(value, Tensor):
        return (
            value.clone() if type(value) is Tensor and value.numel() <= _LARGEST_COPIED else value
        )
    if isinstance(value, RankLocal):
        return RankLocal(_snapshot(value.value))
    if isinstance(value, dict):
        return type(value)({key: _snapshot(each) for key, each in value.items()})
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_snapshot(each) for each in value)
    return copy.copy(value)


def _are_equal(now: Any, before: Any) -> bool:
    """Whether plain data equals its snapshot."""
    if type(now) is not type(before):
        return False
    if isinstance(now, Tensor):
        if type(now) is not Tensor or now.numel() > _LARGEST_COPIED:
            return True  # not copied
        return now.dtype == before.dtype and torch.equal(now, before)
    if isinstance(now, RankLocal):
        return _are_equal(now.value, before.value)
    if isinstance(now, dict):
        return now.keys() == before.keys() and all(
            _are_equal(each, before[key]) for key, each in now.items()
        )
    if isinstance(now, (list, tuple)):
        return len(now) == len(before) and all(map(_are_equal, now, before))
    return bool(now == before or (now != now and before != before))


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


def _restore_options(group: dict[str, Any], before: Mapping[str, Any]) -> None:
    for name, value in before.items():
        now = group.get(name)
        if isinstance(now, Tensor) and isinstance(value, Tensor):
            now.copy_(value)  # a compiled step reads this one
        else:
            group[name] = value


def _optimizer_state(trainer: BaseTrainer, name: str, *, as_target: bool) -> dict[str, Any]:
    optimizer = trainer.named_optimizers()[name]
    if not optimizer.state and not as_target and trainer.counters.global_step == 0:
        return {"state": {}, "param_groups": []}  # a run that begins here has options of its own
    return optimizer_state(_all_in_one(trainer.models_of(optimizer)), optimizer)


def _load_models(trainer: BaseTrainer, states: Mapping[str, Any], *, strict: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    for name, model in trainer.named_models().items():
        if name in states:
            set_model_state_dict(model, dict(states[name]), options=StateDictOptions(strict=strict))


def _load_optimizers(trainer: BaseTrainer, states: Mapping[str, Any]) -> None:
    for name, optimizer in trainer.named_optimizers().items():
        saved = states.get(name)
        if saved and saved["param_groups"]:
            load_optimizer_state(_all_in_one(trainer.models_of(optimizer)), optimizer, saved)


def _all_in_one(models: Mapping[str, nn.Module]) -> nn.Module:
    """The model; a ModuleDict if an optimizer has several."""
    return next(iter(models.values())) if len(models) == 1 else nn.ModuleDict(dict(models))


def _match_names(
    kind: str, here: Mapping[str, Any], saved: Mapping[str, Any], strict: bool
) -> None:
    if set(here) == set(saved):
        return
    message = (
        f"the state has {kind} {sorted(saved) or 'none'}, and the trainer has "
        f"{sorted(here) or 'none'}; use the names they were saved under"
    )
    if strict:
        raise KeyError(message)
    logger.warning("%s; what matches is loaded", message)
