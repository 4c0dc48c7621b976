"""Models: building, parallelizing, compiling, sharding and initializing them.

The order is: tensor and context parallelism, activation checkpointing, compile, FSDP or DDP,
materialize, initialize. In another order, one step would undo or trace another.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dream_trainer.interface.trainer import AbstractTrainer
from dream_trainer.trainer.fsdp_methods import gather_in_methods
from dream_trainer.trainer.metrics import is_metric
from dream_trainer.trainer.mixins import materialize, pretrained
from dream_trainer.trainer.mixins.blocks import (
    blocks_of,
    refuse_separated_parameters,
    tied_parameters,
    units_of,
)
from dream_trainer.trainer.mixins.tracking import assigned_attributes
from dream_trainer.world import torch_private
from dream_trainer.world.determinism import seed_all
from dream_trainer.world.replica_gradients import ReplicaGradients

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


logger = logging.getLogger(__name__)


class ModelSetupMixin(AbstractTrainer):
    """Builds, parallelizes and initializes the models.

    The user writes `configure_models`; every other method has a default that works.
    """

    _model_names: tuple[str, ...] = ()
    replica_gradients: ReplicaGradients | None = None
    seed: int | None

    # What the user writes

    def configure_models(self) -> None:
        """Assign the models to attributes: `self.model = …`.

        A model that is a part of another one, or has two names, is one with it.

        Runs on the meta device if the models will be sharded and there is an `init_weights`,
        else on this rank's device. Inside `with torch.device("cpu"):`, they are built on the CPU,
        and moved later.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no configure_models; write one that assigns the model: "
            "self.model = …"
        )

    def init_weights(self) -> None:
        """Initialize all parameters and buffers, or load pretrained ones. Optional.

        Runs after sharding: parameters may be DTensors. Random numbers are seeded again before it,
        and drawn for whole parameters, of which each rank keeps its shard: weights are the same in
        every layout.
        """

    def apply_tensor_parallel(self, mesh: DeviceMesh) -> None:
        """Parallelize the models' layers over `mesh`, with `parallelize_module`.

        Has no default: it depends on the model which layers to split, and how.
        """
        raise NotImplementedError(
            f"tensor_parallel={self.world.tp_size}, and {type(self).__name__} has no "
            "apply_tensor_parallel(mesh); write one that calls torch's parallelize_module, or set "
            "tensor_parallel=1"
        )

    def apply_context_parallel(self, mesh: DeviceMesh) -> None:
        """Make the models' attention span the sequences that are split over `mesh`.

        Has no default: it depends on the model. `training_step` takes this rank's part
        (`world.cp_rank` of `world.cp_size`) of each sequence in a batch. Gradients of the parts
        are averaged.
        """
        raise NotImplementedError(
            f"context_parallel={self.world.cp_size}, and {type(self).__name__} has no "
            "apply_context_parallel(mesh); write one that makes attention work over the mesh, or "
            "set context_parallel=1"
        )

    def apply_activation_checkpointing(self) -> None:
        """Recompute activations in backward: those of each block, as for `apply_fully_shard`."""
        for model in self.named_models().values():
            for block in blocks_of(model):
                torch_private.checkpoint_activations(block)

    def apply_compile(self) -> None:
        """Compile the models in place."""
        for model in self.named_models().values():
            model.compile()

    def apply_fully_shard(self, config: dict[str, Any]) -> None:
        """Shard the models with FSDP2: each block, then the rest.

        Blocks are the modules in a ModuleList; in a ModuleDict or Sequential that isn't inside a
        block, those that consist of other modules, or all if they are of one class. A module that
        shares a parameter with another one is part of the rest.

        Args:
            config: Keyword arguments of torch's `fully_shard`: `mesh`, `mp_policy`, …
        """
        from torch.distributed.fsdp import fully_shard

        for name, model in self.named_models().items():
            blocks = blocks_of(model)
            # A unit may be a block itself: the model may be a ModuleDict.
            for unit in dict.fromkeys([*blocks, *units_of(model)]):
                fully_shard(unit, **config)
            if not blocks and self.world.is_global_zero:
                _warn_of_one_unit(name, model)

    def apply_replicate(self, mesh: DeviceMesh) -> None:
        """Average the models' gradients over the replicas with DDP, without wrapping the models.

        Gradients that `self.backward` computes are averaged, whichever methods and parts of a model
        were called, and whichever of its parameters require gradients at that time.

        Not called for replicas with tensor or context parallelism, which `apply_fully_shard` gets
        as shards of size 1: DDP loses parameters that are DTensors.

        Args:
            mesh: The axis of replicas.
        """
        self.replica_gradients = ReplicaGradients(self.named_models(), mesh, self.world)

    def model_state_dict(self) -> dict[str, Any]:
        """Tensors to save, by model and parameter name; sharded where the model is."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return {name: get_model_state_dict(model) for name, model in self.named_models().items()}

    # What the trainer reads

    def named_models(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in self._model_names}

    # Building

    def build_models(self) -> None:
        """Call `configure_models` on its device and track the models it assigns."""
        if self.world.pp_size > 1:
            raise NotImplementedError(
                f"pipeline_parallel={self.world.pp_size}: torch's pipeline schedules run forward "
                "and backward themselves, which is training_step's part here; set "
                "pipeline_parallel=1 and divide the model with dp_shard or tensor_parallel"
            )
        on_meta = self._is_sharded and self._has_init_weights
        device = torch.device("meta") if on_meta else self.world.device
        tracking, explaining = assigned_attributes(self, _is_model), pretrained.explained(device)
        with tracking as names, explaining, device:
            self.configure_models()
        if not names:
            raise RuntimeError(
                f"{type(self).__name__}.configure_models assigned no nn.Module to an attribute; "
                "assign the model: self.model = …"
            )
        self._model_names = _outermost({name: getattr(self, name) for name in names})
        if self.world.shape.uses_fsdp or self.world.shape.dp_replicate > 1:
            _refuse_shared_parameters(self.named_models())

    def prepare_models(self) -> None:
        """Parallelize, compile, shard, materialize and initialize the models."""
        parameters, shape = self.config.device_parameters, self.world.shape
        if shape.tp > 1:
            self.apply_tensor_parallel(self.world.get_mesh("tp"))
        if shape.cp > 1:
            self.apply_context_parallel(self.world.get_mesh("cp"))
        if parameters.checkpoint_activations:
            self.apply_activation_checkpointing()
        if parameters.compile_model:
            self.apply_compile()
        if shape.uses_fsdp:
            tied = tied_parameters(self.named_models())
            self.apply_fully_shard(self._fully_shard_config())
            refuse_separated_parameters(tied, self.named_models())
            for model in self.named_models().values():
                gather_in_methods(model, type(self))
        elif shape.dp_replicate > 1:
            self.apply_replicate(self.world.get_mesh("dp_replicate"))
        self._materialize()
        if shape.uses_fsdp:
            for model in self.named_models().values():
                torch_private.initialize_frozen_groups(model)
        if self.replica_gradients is not None:
            self.replica_gradients.start()

    @property
    def _is_sharded(self) -> bool:
        return self.world.shape.uses_fsdp or self.world.shape.tp > 1

    @property
    def _has_init_weights(self) -> bool:
        return type(self).init_weights is not ModelSetupMixin.init_weights

    def _fully_shard_config(self) -> dict[str, Any]:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

        parameters = self.config.device_parameters
        config: dict[str, Any] = {
            "mesh": self.world.fsdp_mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=parameters.param_dtype,
                reduce_dtype=parameters.reduce_dtype,
                # Autocast casts where a product needs it; a position 1001.0 stays what it is.
                cast_forward_inputs=parameters.computes_in is None,
            ),
        }
        if parameters.cpu_offload:
            if self.world.is_global_zero:
                _warn_of_one_thread()
            can_pin = self.world.device.type in ("cuda", "xpu")
            config["offload_policy"] = CPUOffloadPolicy(pin_memory=can_pin)
        return config

    def _materialize(self) -> None:
        """Give tensors on the meta device memory, initialize all, and put buffers on the device."""
        offloads = self.config.device_parameters.cpu_offload and self.world.shape.uses_fsdp
        device = torch.device("cpu") if offloads else self.world.device
        models, empty = self.named_models(), dict[str, set[str]]()
        for name, model in models.items():
            if not materialize.has_meta_tensors(model):
                model.to(device)
            elif self._has_init_weights:
                empty[name] = materialize.allocate(model, device)
            else:
                raise RuntimeError(
                    f"model {name!r} is on the meta device, and {type(self).__name__} has no "
                    "init_weights to give it values; write one, or build it on a real device"
                )
        if self._has_init_weights:
            drawing: AbstractContextManager[Any] = (
                self.world.sharded_random() if self._is_sharded else nullcontext()
            )
            if self.seed is not None:  # models built on meta have drawn no numbers, others have
                seed_all(self.seed)
            with torch.no_grad(), drawing:
                self.init_weights()
        still_empty = [
            f"{name}.{key}"
            for name, keys in empty.items()
            for key in materialize.still_empty(models[name], keys)
        ]
        if still_empty:
            raise RuntimeError(
                f"{', '.join(still_empty[:5])}{' …' if len(still_empty) > 5 else ''}: built on the "
                "meta device, so values of the constructor are lost, and init_weights set none; "
                "set every parameter and buffer in init_weights"
            )
        for model in models.values():
            # FSDP copies offloaded parameters to the device for a forward, and leaves buffers.
            materialize.move_buffers(model, self.world.device)


def _warn_of_one_unit(name: str, model: nn.Module) -> None:
    """Warn if a model of several layers has no blocks to shard one by one."""
    num_layers = sum(any(True for _ in part.parameters(recurse=False)) for part in model.modules())
    if num_layers > 1:
        logger.warning(
            "model %r has no blocks in a ModuleList, ModuleDict or Sequential, so it is one FSDP "
            "unit: each rank gathers all of its %d parameters at once; put its layers into a "
            "ModuleList, or override apply_fully_shard(config)",
            name,
            sum(parameter.numel() for parameter in model.parameters()),
        )


def _warn_of_one_thread() -> None:
    """Warn if offloaded optimizers will leave cores idle."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores_per_rank = (num_cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if torch.get_num_threads() == 1 and cores_per_rank > 1:
        logger.warning(
            "cpu_offload=True runs the optimizer on the CPU, with one thread; this machine has %d "
            "cores per rank: set OMP_NUM_THREADS=%d (torchrun sets it to 1 if it isn't set)",
            cores_per_rank,
            cores_per_rank,
        )


def _is_model(value: Any) -> bool:
    if not isinstance(value, nn.Module):
        return False
    return not is_metric(value) or any(p.requires_grad for p in value.parameters())


def _outermost(models: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Names of the models that aren't parts of others; the first name of each."""
    originals = {name: torch_private.uncompiled(model) for name, model in models.items()}
    parts = {
        id(part)
        for model in dict.fromkeys(originals.values())
        for part in model.modules()
        if part is not model
    }
    names: dict[int, str] = {}
    for name, original in originals.items():
        if id(original) not in parts:
            names.setdefault(id(original), name)
    return tuple(names.values())


def _refuse_shared_parameters(models: Mapping[str, nn.Module]) -> None:
    """Refuse models that share parameters, whose gradients each would reduce by itself."""
    owners: dict[int, str] = {}
    for name, model in models.items():
        for key, parameter in model.named_parameters():
            owner = owners.setdefault(id(parameter), f"{name}.{key}")
            if not owner.startswith(f"{name}."):
                raise RuntimeError(
                    f"{owner} and {name}.{key} are one parameter; with DDP and FSDP each model "
                    "reduces its gradients by itself, so no two may share parameters: assign one "
                    "module that has both as parts, and whose forward runs them"
                )
