"""Callback and RankZeroCallback: all hooks of a run.

The whole loop with every hook::

    fit()
      pre_launch                                # the process group doesn't exist yet
      launch the world, seed
      pre_configure
        configure_models
      post_configure
      pre_setup
        shard, compile, materialize and initialize the models
        build loaders, optimizers, schedulers, metrics
      post_setup                                # a checkpoint is restored here
      pre_fit
      if num_sanity_val_steps and nothing has been trained: validate()
      for each epoch:
        pre_epoch
        pre_train_epoch
        for each batch:                         # moved to the device already
          batch = pre_train_step(batch, batch_idx)            [each batch]
          with train_context():                               [each batch]
            result = training_step(batch, batch_idx)
              backward(loss)
              if not is_accumulating_gradients:
                step(optimizer):
                  clip gradients
                  pre_optimizer_step(model, optimizer)        [each step, each optimizer]
                  optimizer.step()
                  post_optimizer_step(model, optimizer)       [each step, each optimizer]
                  pre_optimizer_zero_grad(model, optimizer)   [each step, each optimizer]
                  optimizer.zero_grad()
                  post_optimizer_zero_grad(model, optimizer)  [each step, each optimizer]
                  scheduler.step()
          # the counters advance: batches each time, global_step with the last of a group
          post_train_step(result, batch_idx)                  [each batch]
          if the ranks have agreed to stop: leave             [after the last batch of a step]
          if val_every_n_steps are done: validate()
        post_train_epoch(result)
        unless val_every_n_steps: validate()
        post_epoch
      post_fit

    validate()
      pre_validation_epoch
      for each batch:                           # moved to the device already
        batch = pre_validation_step(batch, batch_idx)
        with validation_context():
          result = validation_step(batch, batch_idx)
        post_validation_step(result, batch_idx)
        if the ranks have agreed to stop: leave, to validate again when resumed
      post_validation_epoch(result)

    SIGTERM, Ctrl-C: stop() is called; after post_fit the signal takes effect

    after an error, a second Ctrl-C or SystemExit, from wherever it came, another rank included:
      on_exception(exception)                   # every callback
      post_fit                                  # every callback whose pre_fit ran

What the payloads hold:

- `batch`: what the loader gave, on this rank's device. What a `pre_…_step` hook returns replaces
  it for the callbacks after it and for the step; None keeps it.
- `result` of a step: the dict that the step returned, its tensors detached; a bare tensor becomes
  `{"loss": tensor}`. Values are this rank's, and of this batch. Reading one on the host
  (`.item()`, `float()`, `print`) waits for the device.
- `result` of an epoch: for each scalar that the steps returned its mean over the epoch's samples
  and over all data-parallel ranks, a float; computed metrics; of other values the last batch's.
- `model, optimizer`: the optimizer that steps and the model that it belongs to.

Hooks run in the order of the collection, `pre_` and `post_` alike; contexts nest, the first one
outermost. Only overridden hooks are ever called. Every hook runs on every rank, except those of a
RankZeroCallback.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from typing_extensions import TypeVar

from dream_trainer.callbacks.class_checks import check_definition
from dream_trainer.callbacks.requirements import requirements_of
from dream_trainer.interface.trainer import AbstractTrainer

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

TrainerT = TypeVar("TrainerT", bound=AbstractTrainer, default=AbstractTrainer)


class Callback(Generic[TrainerT]):
    """Extends a run at the moments that it overrides.

    The parameter is what the callback needs of its trainer: `Callback[BaseTrainer]`, a mixin, or
    several (`Callback[A & B]`, or an `@intersection` class). A trainer that lacks it is refused
    when the collection is attached. `self.trainer` is typed accordingly.

    A class may say where it wants to be: `before = {"ProgressBar"}`, `after = {EMACallback}`,
    with classes (their subclasses count) or names. `after = {Callback}` means after everyone. An
    instance may be given a `before` and `after` of its own, where other callbacks can stand too.

    Raises:
        TypeError: When a subclass is defined whose hooks can't work: misspelt, with a signature
            that can't take the hook's arguments, a coroutine, or hidden behind this class.
    """

    before: ClassVar[Collection[type | str]] = ()
    after: ClassVar[Collection[type | str]] = ()

    trainer: TrainerT
    """Set when the callback is attached; not there before."""

    # Hooks, in the order of a run

    def pre_launch(self) -> None:
        """Before the distributed world exists: no device, no collectives."""

    def pre_configure(self) -> None:
        """Before the models are built."""

    def post_configure(self) -> None:
        """After the models are built, perhaps on the meta device."""

    def pre_setup(self) -> None:
        """Before the models are sharded and materialized."""

    def post_setup(self) -> None:
        """After models, loaders, optimizers and schedulers are ready."""

    def pre_fit(self) -> None:
        """Before anything is trained; also when `fit` is called again."""

    def pre_epoch(self) -> None:
        """Before training and validation of an epoch."""

    def pre_train_epoch(self) -> None:
        """Before the first batch of an epoch."""

    def pre_train_step(self, batch: Any, batch_idx: int) -> Any:
        """Before each batch; what it returns replaces the batch."""

    def train_context(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around each training batch."""
        return contextlib.nullcontext()

    def pre_optimizer_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Before each `optimizer.step()`, with gradients clipped."""

    def post_optimizer_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """After each `optimizer.step()`, with gradients still there."""

    def pre_optimizer_zero_grad(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Before each `optimizer.zero_grad()`."""

    def post_optimizer_zero_grad(self, model: nn.Module, optimizer: Optimizer) -> None:
        """After each `optimizer.zero_grad()`."""

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        """After each batch, with the counters advanced; `result` is this rank's, detached."""

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        """After the last batch of an epoch; `result` is the mean over samples and ranks."""

    def pre_validation_epoch(self) -> None:
        """Before a validation run."""

    def pre_validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Before each validation batch; what it returns replaces the batch."""

    def validation_context(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around each validation batch."""
        return contextlib.nullcontext()

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        """After each validation batch; `result` is this rank's."""

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        """After a validation run; `result` is the mean over samples and ranks, and the metrics."""

    def post_epoch(self) -> None:
        """After training and validation of an epoch."""

    def on_exception(self, exception: BaseException) -> None:
        """After any exception left the loop, a second Ctrl-C included, before `post_fit`.

        On every rank, whichever failed: elsewhere `exception` is a RemoteError that names the
        first. Other ranks may be gone, so collectives raise.
        """

    def post_fit(self) -> None:
        """After training, and after an error: `trainer.exception` tells.

        Not called if `pre_fit` didn't end.
        """

    # State: not hooks, but called by checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What the callback needs to continue: plain data, loadable with `weights_only=True`.

        Equal on all ranks, except for values wrapped in RankLocal.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], trainer: TrainerT) -> None:
        """Continue from what `state_dict` returned. The `trainer` argument may be left out."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_definition(cls, Callback, HOOKS)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or a pickle, is a callback of its own, attached to nobody.
        return {name: value for name, value in vars(self).items() if name != "trainer"}

    @classmethod
    def requirements(cls) -> tuple[type, ...]:
        """The classes that a trainer must derive from to take this callback."""
        return requirements_of(cls, Callback)


HOOKS: Mapping[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(function).parameters)[1:]
    for name, function in vars(Callback).items()
    if inspect.isfunction(function)
    and not name.startswith("_")
    and name not in ("state_dict", "load_state_dict")
}
"""Names of a hook's arguments, by the hook's name, in the order of a run."""

CONTEXTS = ("train_context", "validation_context")
"""The hooks that return a context manager."""


class RankZeroCallback(Callback[TrainerT]):
    """A callback whose hooks run on global rank 0 alone.

    Its hooks must not call collectives, since the other ranks don't: with `debug=True` in the
    trainer's config that is an error. Its state is rank 0's.
    """
