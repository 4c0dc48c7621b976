"""Facts about a run for the trainer summary: layout, data, optimizers, callbacks, advice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dream_callbacks.summary.advice import advice
from dream_callbacks.summary.model_rows import num_elements
from dream_trainer.trainer import BaseTrainer

_MOST_HOOKS = 4


def run_facts(trainer: BaseTrainer) -> dict[str, list[str]]:
    """Facts about a trainer that is set up: lines of text by name, without empty ones."""
    facts = {
        "run": [f"{trainer.project} / {trainer.group} / {trainer.experiment}"],
        "evaluation": [] if trainer.running in ("fit", None) else [f"{trainer.running}()"],
        "directory": [str(trainer.run_dir)],
        "resumes": _resumes(trainer),
        "seed": [str(trainer.seed)],
        "device": [_device(trainer.world.device)],
        "layout": [_layout(trainer)],
        "precision": [_precision(trainer)],
        "training": [_training(trainer)],
        "data": [_training_data(trainer)],
        "validation": list(_validation(trainer)),
        "optimizers": [_optimizer(*item) for item in trainer.named_optimizers().items()],
        "schedulers": _schedulers(trainer),
        "callbacks": list(_callbacks(trainer)),
        "advice": advice(trainer),
    }
    return {name: lines for name, lines in facts.items() if lines}


def _resumes(trainer: BaseTrainer) -> list[str]:
    if not trainer.local_batches:
        return []
    epoch, batches = trainer.current_epoch + 1, trainer.counters.epoch_batches
    done = f"{_plural(batches, 'batch')} of epoch {epoch} done"
    return [f"after step {trainer.global_step:,}, {done}"]


def _device(device: torch.device) -> str:
    if device.type not in ("cuda", "xpu"):
        threads = _plural(torch.get_num_threads(), "thread")
        return f"{device}, {threads}, torch {torch.__version__}"
    properties = torch.get_device_module(device).get_device_properties(device)
    memory_gib = properties.total_memory / 2**30
    return f"{device}, {properties.name}, {memory_gib:.0f} GiB, torch {torch.__version__}"


def _layout(trainer: BaseTrainer) -> str:
    world, parameters = trainer.world, trainer.config.device_parameters
    axes = [f"{axis} {size}" for axis, size in asdict(world.shape).items() if size > 1]
    extras = {
        "parameters offloaded to the host": parameters.cpu_offload,
        "gradients reduced every batch": parameters.reduce_every_batch,
        "activation checkpointing": parameters.checkpoint_activations,
        "compiled": parameters.compile_model,
    }
    return ", ".join(
        [
            world.shape.layout,
            _plural(world.world_size, "rank"),
            *([f"mesh {' × '.join(axes)}"] if axes else []),
            *(text for text, applies in extras.items() if applies),
        ]
    )


def _precision(trainer: BaseTrainer) -> str:
    parameters = trainer.config.device_parameters
    tensors = (p for model in trainer.named_models().values() for p in model.parameters())
    dtypes = dict.fromkeys(_dtype(tensor.dtype) for tensor in tensors)
    texts = [f"{' and '.join(dtypes) or 'no'} parameters"]
    if parameters.param_dtype is not None and trainer.world.shape.uses_fsdp:
        texts.append(f"computed in {_dtype(parameters.param_dtype)}")
    elif parameters.computes_in is not None:
        texts.append(f"autocast to {_dtype(parameters.computes_in)}")
    if parameters.reduce_dtype is not None:
        texts.append(f"gradients reduced in {_dtype(parameters.reduce_dtype)}")
    return ", ".join(texts)


def _training(trainer: BaseTrainer) -> str:
    parameters, num_batches = trainer.training_parameters, trainer.num_train_batches
    accumulation, texts = parameters.gradient_accumulation_steps, []
    if math.isfinite(parameters.epoch_limit):
        texts.append(_plural(int(parameters.epoch_limit), "epoch"))
    if parameters.max_steps is not None:
        texts.append(f"at most {_plural(parameters.max_steps, 'step')}")
    if parameters.max_time is not None:
        texts.append(f"at most {parameters.max_time:g} s")
    if num_batches is not None:
        texts.append(f"{_plural(math.ceil(num_batches / accumulation), 'step')} per epoch")
    if accumulation > 1:
        texts.append(f"{accumulation} batches per step")
    if parameters.gradient_clip_val is not None:
        texts.append(f"gradients clipped to norm {parameters.gradient_clip_val:g}")
    return ", ".join(texts)


def _training_data(trainer: BaseTrainer) -> str:
    loader = trainer.train_dataloader
    text = _loader(loader, trainer.num_train_batches)
    accumulation = trainer.training_parameters.gradient_accumulation_steps
    num_ranks = trainer.world.dp_size
    size = loader.batch_size if isinstance(loader, DataLoader) else None
    if size is None or accumulation * num_ranks == 1:
        return text
    factors = [f"{size}"]
    factors += [f"{accumulation} batches"] if accumulation > 1 else []
    factors += [f"{num_ranks} ranks"] if num_ranks > 1 else []
    return f"{text}; {size * accumulation * num_ranks:,} samples per step ({' × '.join(factors)})"


def _validation(trainer: BaseTrainer) -> Iterator[str]:
    parameters, sets = trainer.training_parameters, trainer.validation_sets
    if not sets:
        yield "none"
        return
    if not trainer.validates or parameters.val_every_n_steps == 0:
        yield "disabled, the loader is not used"
        return
    steps = parameters.val_every_n_steps
    texts = ["each epoch" if steps is None else f"every {_plural(steps, 'step')}"]
    if parameters.num_sanity_val_steps:
        texts.append(f"sanity check of {_plural(parameters.num_sanity_val_steps, 'batch')}")
    for each in sets:
        num_batches = each.num_batches(trainer.world.rank, parameters.val_steps_per_epoch)
        loader = _loader(each.loader, num_batches)
        yield ", ".join([f"{each.name}: {loader}" if each.name else loader, *texts])


def _loader(loader: Iterable[Any], num_batches: int | None) -> str:
    count = "any number of batches" if num_batches is None else _plural(num_batches, "batch")
    text = f"{type(loader).__name__}, {count}"
    if isinstance(loader, DataLoader):
        text += f" of {loader.batch_size}" if loader.batch_size is not None else ""
        text += f", {_plural(loader.num_workers, 'worker')}" if loader.num_workers else ""
    return text


def _optimizer(name: str, optimizer: Optimizer) -> str:
    groups = optimizer.param_groups
    rates = sorted({float(group["lr"]) for group in groups if "lr" in group})
    total = sum(num_elements(parameter) for group in groups for parameter in group["params"])
    texts = [type(optimizer).__name__]
    if rates:
        texts.append(
            f"lr {' to '.join(f'{rate:g}' for rate in dict.fromkeys((rates[0], rates[-1])))}"
        )
    texts.append(f"{_plural(total, 'parameter')}")
    if len(groups) > 1:
        texts.append(f"{len(groups)} groups")
    return f"{name}: {', '.join(texts)}"


def _schedulers(trainer: BaseTrainer) -> list[str]:
    names = {id(optimizer): name for name, optimizer in trainer.named_optimizers().items()}
    return [
        f"{name}: {type(each.scheduler).__name__} of {names.get(id(each.optimizer), 'another')}"
        + _when(*each.options)
        for name, each in trainer.named_schedules().items()
    ]


def _when(interval: str | None, monitor: str | None) -> str:
    when = {"epoch": ", each epoch", "validation": ", each validation", "manual": ", manual"}
    return when.get(interval or "", "") + (f" by {monitor}" if monitor else "")


def _callbacks(trainer: BaseTrainer) -> Iterator[str]:
    plan = trainer.callbacks.plan()
    for name in _in_order(trainer.callbacks.keys(), plan.hooks):
        hooks = [hook for hook, names in plan.hooks.items() if name in names]
        more = len(hooks) - _MOST_HOOKS
        shown = ", ".join(hooks[:_MOST_HOOKS]) + (f" and {more} more" if more > 0 else "")
        is_for_rank_zero = name in plan.rank_zero and trainer.world.is_distributed
        yield f"{name}{' (rank 0)' if is_for_rank_zero else ''}: {shown or 'no hooks'}"


def _in_order(names: Iterable[str], hooks: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Names sorted by their order of execution in the hooks."""
    waiting, done = list(names), set[str]()
    earlier = {
        name: {other for row in hooks.values() if name in row for other in row[: row.index(name)]}
        for name in waiting
    }
    while waiting:
        name = next(name for name in waiting if earlier[name] <= done)
        waiting.remove(name)
        done.add(name)
        yield name


def _plural(count: int, what: str) -> str:
    plural = "" if count == 1 else "es" if what.endswith("ch") and what != "epoch" else "s"
    return f"{count:,} {what}{plural}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
