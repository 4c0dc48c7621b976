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
      if num_sanity_val_steps and nothing has been trained: a few batches of each validation set,
        with the hooks of a step alone          # trainer.is_sanity_validating
      for each epoch:
        pre_epoch
        pre_train_epoch
        for each batch:                         # moved to the device already
          batch = pre_train_step(batch, batch_idx)            [each batch]
          with train_context():                               [each batch]
            result = training_step(batch, batch_idx)
              backward(loss)
              if not is_accumulating_gradients:
                step(optimizer):                # with a closure: clipped in optimizer.step()
                  clip gradients, if gradient_clip_val or clip_gradients(model)
                  pre_optimizer_step(model, optimizer)        [each step, each optimizer]
                  optimizer.step()
                  post_optimizer_step(model, optimizer)       [each step, each optimizer]
                  pre_optimizer_zero_grad(model, optimizer)   [each step, each optimizer]
                  optimizer.zero_grad()
                  post_optimizer_zero_grad(model, optimizer)  [each step, each optimizer]
                  scheduler.step()                            [with interval="step"]
          # the counters advance: batches each time, global_step with the last of a group, by the
          # largest number of steps of one optimizer
          post_train_step(result, batch_idx)                  [each batch]
          if the ranks have agreed to stop: leave             [after the last batch of a step]
          if val_every_n_steps are done: a validation run
        post_train_epoch(result)
        unless val_every_n_steps: a validation run
        scheduler.step()                                      [with interval="epoch"]
        post_epoch
      if max_steps are reached inside an epoch, unless val_every_n_steps: a validation run, after
        which training would continue as if it hadn't been
      post_fit

    a validation run
      pre_validation_epoch
      for each validation set:                  # its name, if it has one: trainer.validation_set
        for each batch:                         # moved to the device already; batch_idx from 0
          batch = pre_validation_step(batch, batch_idx)
          with validation_context():
            result = validation_step(batch, batch_idx)
          post_validation_step(result, batch_idx)
          if the ranks have agreed to stop: leave, to validate again when resumed
      scheduler.step()                          # with interval="validation", in fit
      post_validation_epoch(result)

    validate(), test(loaders), predict(loader)  # trainer.running says which
      everything up to post_setup, if that hasn't been done
      a validation run, of test_step in test and predict_step in predict; in predict without the
        two epoch hooks

    SIGTERM, Ctrl-C: stop() is called; after post_fit the signal takes effect

    after an error, a second Ctrl-C or SystemExit, on any rank:
      on_exception(exception)                   # every callback
      post_fit                                  # every callback whose pre_fit ran

Payloads:

- `batch`: from the loader, on this rank's device. The return value of a `pre_…_step` hook replaces
  it for later callbacks and for the step; None keeps it.
- `result` of a step: the dict that the step returned, its tensors detached; a bare tensor becomes
  `{"loss": tensor}`. Values are of this rank and this batch. A number is a Python number or a
  tensor with one element: a `WeightedMean` becomes its value, a DTensor its full value. Reading a
  tensor on the host (`.item()`, `float()`, `print`) is a device sync. Numbers are copies and may be
  kept; clone other tensors to keep them, since a later step may overwrite their memory.
- `result` of an epoch: for each number that the steps returned, its mean over the epoch's samples
  on all ranks that reported it, a float; computed metrics; the last batch's other values. Keys of a
  validation set with a name begin with it: `noisy/val_loss`.
- `model, optimizer`: the optimizer and the model that it updates.

Hooks run in the order of the collection, `pre_` and `post_` alike; contexts nest, the first one
outermost. Only overridden hooks are ever called. Every hook runs on every rank, except those of a
RankZeroCallback.

Each validation sample is evaluated on one rank, once, so ranks may have different numbers of
validation batches. A rank that has none left repeats one while others have more, to take part in
the collectives of the model, inside `validation_context`; it reports nothing, and its
`pre_validation_step` and `post_validation_step` aren't called. In them, a collective is an error as
soon as a rank has no batch.
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
    """Base class of callbacks: override hooks to extend a run.

    The type parameter declares what the callback requires of its trainer: `Callback[BaseTrainer]`,
    a mixin, or several (`Callback[A & B]`, or an `@intersection` class). A trainer that lacks it is
    refused when the collection is attached. `self.trainer` is typed accordingly.

    A class may constrain its order: `before = {"ProgressBar"}`, `after = {EMACallback}`, with
    classes (including subclasses) or names. `after = {Callback}` means after all others. Instances
    may have their own `before` and `after`, which may also contain callbacks.

    Raises:
        TypeError: When a subclass with an invalid hook is defined: misspelt, with a signature that
            can't take the hook's arguments, a coroutine, or hidden by this class.
    """

    before: ClassVar[Collection[type | str]] = ()
    after: ClassVar[Collection[type | str]] = ()

    trainer: TrainerT
    """Set when the callback is attached; missing before."""

    # Hooks, in the order of a run

    def pre_launch(self) -> None:
        """Before the distributed world exists: no device, no collectives."""

    def pre_configure(self) -> None:
        """Before the models are built."""

    def post_configure(self) -> None:
        """After the models are built, possibly on the meta device."""

    def pre_setup(self) -> None:
        """Before the models are sharded and materialized."""

    def post_setup(self) -> None:
        """After models, loaders, optimizers and schedulers are built."""

    def pre_fit(self) -> None:
        """Before training, each time `fit` is called."""

    def pre_epoch(self) -> None:
        """Before training and validation of an epoch."""

    def pre_train_epoch(self) -> None:
        """Before the first batch of an epoch."""

    def pre_train_step(self, batch: Any, batch_idx: int) -> Any:
        """Before each batch; a return value replaces the batch."""

    def train_context(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around each training batch."""
        return contextlib.nullcontext()

    def pre_optimizer_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Before each `optimizer.step()`, with gradients clipped; with a closure, before those."""

    def post_optimizer_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """After each `optimizer.step()`, before gradients are zeroed."""

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
        """Before each validation batch; a return value replaces the batch."""

    def validation_context(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around each validation batch."""
        return contextlib.nullcontext()

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        """After each validation batch; `result` is this rank's."""

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        """After a validation run; `result` has means over samples and ranks, and the metrics."""

    def post_epoch(self) -> None:
        """After training and validation of an epoch."""

    def on_exception(self, exception: BaseException) -> None:
        """After any exception left the loop, including a second Ctrl-C, before `post_fit`.

        On every rank: on ranks that didn't fail, `exception` is a RemoteError that names the first
        failure. Other ranks may be gone, so collectives raise.
        """

    def post_fit(self) -> None:
        """After training, and after an error, which is in `trainer.exception`.

        Not called if `pre_fit` raised or wasn't called.
        """

    # State: not hooks; called by checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume: plain data, loadable with `weights_only=True`.

        Equal on all ranks, except for values wrapped in RankLocal.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], trainer: TrainerT) -> None:
        """Restore the result of `state_dict`. The `trainer` parameter may be omitted."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_definition(cls, Callback, HOOKS)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or pickle isn't attached to a trainer.
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
"""Names of the arguments of each hook, by its name, in the order of a run."""

CONTEXTS = ("train_context", "validation_context")
"""The hooks that return a context manager."""


class RankZeroCallback(Callback[TrainerT]):
    """A callback whose hooks run on global rank 0 only.

    Its hooks must not call collectives, since the other ranks don't: with `debug=True` in the
    trainer's config that is an error. Its state is rank 0's.
    """
