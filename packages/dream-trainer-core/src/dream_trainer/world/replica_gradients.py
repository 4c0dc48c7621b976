"""ReplicaGradients: averages gradients over replicas, whatever part of a model computed them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dream_trainer.world import torch_private

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from dream_trainer.world.world import World

_MAX_REDUCERS = 4
"""Sets of trained parameters whose DDP is kept; two optimizers of a GAN alternate between two."""

_requires_grad = operator.attrgetter("requires_grad")


class ReplicaGradients:
    """Averages the gradients of models over their replicas, while they are computed.

    Torch's DDP does it. DDP learns of a backward from the forward of the module that it wraps, and
    knows the parameters that required gradients when it was made. This class tells it of each
    backward and makes another one if `requires_grad` has changed. So a step may call methods other
    than `forward` and parts of the model, a loss may depend on some of the parameters only, several
    losses may be backpropagated in one step, and parameters may be frozen and unfrozen.

    All models have one DDP: ranks reduce in one order, also if their losses reach different models,
    and a backward completes the reduction of gradients that batches before it accumulated.

    Gradients are views of the buckets that DDP reduces, which saves a copy of all of them.

    Args:
        models: By name. Their parameters are those of the whole run; buffers are left alone.
        mesh: The axis of replicas.
        world: Launched.
    """

    def __init__(self, models: Mapping[str, nn.Module], mesh: DeviceMesh, world: World) -> None:
        self._models = models
        named = {
            id(parameter): (f"{model_name}.{name}", parameter)
            for model_name, model in models.items()
            for name, parameter in model.named_parameters()
        }
        self._names = [name for name, _ in named.values()]
        self._parameters = [parameter for _, parameter in named.values()]
        self._group = mesh.get_group()
        self._world = world
        self._ddps: dict[tuple[bool, ...], nn.parallel.DistributedDataParallel] = {}
        self._trained: tuple[bool, ...] | None = None
        self._reduced: set[tuple[bool, ...]] = set()
        self._ddp: nn.parallel.DistributedDataParallel | None = None

    def start(self) -> None:
        """Give all replicas the parameters and buffers of the first. Collective.

        Raises:
            ValueError: As `prepare`.
        """
        buffers = (buffer for model in self._models.values() for buffer in model.buffers())
        for tensor in (*self._parameters, *buffers):
            dist.broadcast(tensor.detach(), group=self._group, group_src=0)
        self._choose(tuple(map(_requires_grad, self._parameters)))

    def begin_last_batch(self) -> None:
        """Look from now on which gradients are averaged: those of batches before were not."""
        self._reduced = set()

    def unreduced_parameters(self) -> list[nn.Parameter]:
        """Parameters with gradients that no backward since `begin_last_batch` averaged."""
        return [
            parameter
            for index, parameter in enumerate(self._parameters)
            if parameter.grad is not None and not any(each[index] for each in self._reduced)
        ]

    def prepare(self) -> None:
        """Reduce the gradients of the next backward.

        Collective if `requires_grad` of a parameter has changed since the last call.

        Raises:
            ValueError: On all ranks, if different parameters require gradients.
        """
        trained = tuple(map(_requires_grad, self._parameters))
        if trained != self._trained:
            self._choose(trained)
        self._reduced.add(trained)
        if self._ddp is not None:
            torch_private.begin_reduction(self._ddp)

    def finish(self) -> None:
        """Complete the reduction after a backward that didn't reach all parameters.

        A parameter that it reached on no rank has no gradient then, as in one process. Device sync
        if there is such a parameter.
        """
        if self._ddp is None:
            return
        missing = torch_private.missing_gradients(self._ddp)
        if missing:
            trained = [p for p in self._parameters if p.requires_grad]
            self._complete([trained[index] for index in missing])

    def _complete(self, parameters: Sequence[nn.Parameter]) -> None:
        without = [parameter for parameter in parameters if parameter.grad is None]
        # Added to any gradient, also 0.0, of another rank, -0.0 changes nothing.
        nothing = [torch.full_like(parameter, -0.0) for parameter in parameters]
        torch.autograd.backward(parameters, nothing)
        if not without:
            return
        is_reached = torch.stack([_is_reached(parameter.grad) for parameter in without]).tolist()
        for parameter, is_reached_on_some_rank in zip(without, is_reached, strict=True):
            if not is_reached_on_some_rank:
                parameter.grad = None

    def _choose(self, trained: tuple[bool, ...]) -> None:
        """Use the DDP of the parameters that require gradients now. Collective for a new one."""
        self._trained = trained
        self._ddp = self._ddps.pop(trained, None)
        if self._ddp is None and any(trained):
            names = list(itertools.compress(self._names, trained))
            self._world.agree(names, "the parameters that require gradients")
            self._ddp = self._new_ddp()
        if self._ddp is not None:
            self._ddps[trained] = self._ddp  # the last one used is the last to go
        if len(self._ddps) > _MAX_REDUCERS:
            torch_private.end_reductions(self._ddps.pop(next(iter(self._ddps))))

    def _new_ddp(self) -> nn.parallel.DistributedDataParallel:
        return nn.parallel.DistributedDataParallel(
            nn.ParameterList(p for p in self._parameters if p.requires_grad),
            process_group=self._group,
            gradient_as_bucket_view=True,
            init_sync=False,  # `start` did it; in a step, a graph needs the weights as they are
        )


def _is_reached(gradient: Tensor | None) -> Tensor:
    """Whether any rank had a gradient that `_complete` didn't make: another number than -0.0."""
    assert gradient is not None, "the reduction set it"
    numbers = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    return ((numbers != 0) | ~numbers.signbit()).any()
