"""BaseTrainer: the training loop around the user's `training_step`."""

from __future__ import annotations

import functools
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from dream_trainer.interface.trainer import Call, Counters
from dream_trainer.interface.weights_source import CheckpointChoice
from dream_trainer.trainer import evaluation, loop, state
from dream_trainer.trainer.batches import BatchStream
from dream_trainer.trainer.class_checks import check_definition
from dream_trainer.trainer.config import BaseTrainerConfig
from dream_trainer.trainer.device_transfer import moved_to
from dream_trainer.trainer.epoch_schedules import EpochSchedules
from dream_trainer.trainer.evaluation_sets import EvaluationSet, evaluation_sets
from dream_trainer.trainer.gradient_steps import GradientSteps
from dream_trainer.trainer.guarded_names import GuardedNames
from dream_trainer.trainer.loader_watch import LoaderWatch
from dream_trainer.trainer.predictions import default_prediction
from dream_trainer.trainer.replicas import broadcast_buffers, refuse_different_replicas
from dream_trainer.trainer.results import EpochMeans
from dream_trainer.trainer.samples import SampleCounter
from dream_trainer.trainer.validation import EvaluationRun, validation_run
from dream_trainer.world.determinism import RandomStream
from dream_trainer.world.replica_gradients import ReplicaGradients
from dream_trainer.world.requests import Requests, Tick
from dream_trainer.world.world import World

logger = logging.getLogger(__name__)


class BaseTrainer(GradientSteps, GuardedNames):
    """The loop, around a `training_step` that stays plain PyTorch.

    Combine it with SetupMixin, as DreamTrainer does, or with your own setup.

    Args:
        config: An instance of the config class that the trainer declares.
        world: Used instead of the ranks that torchrun started, such as a SimulatedWorld. Trainers
            may share a world if their configs have the same `device_parameters`; an error in one
            of them shuts it down for all.

    Raises:
        TypeError: If the trainer lacks what a callback requires; where the class is defined, if it
            has an optional method under a misspelt name.
        ValueError: If numbers of the config contradict each other or the number of ranks. All
            errors are raised before anything is launched or written.
    """

    config: BaseTrainerConfig
    epoch_schedules: EpochSchedules
    train_batches: BatchStream
    validation_sets: tuple[EvaluationSet, ...] = ()
    replica_gradients: ReplicaGradients | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_definition(cls)

    def __init__(self, config: BaseTrainerConfig, *, world: World | None = None) -> None:
        if not isinstance(config, BaseTrainerConfig):
            raise TypeError(
                f"{type(self).__name__} was given {config!r:.80}; an instance of a config is "
                f"required: {type(self).__name__}(DreamTrainerConfig(…))"
            )
        super().__init__()
        self.config = config
        self.training_parameters = config.training_parameters
        self.training_parameters.validate()
        self.world = World(config.device_parameters) if world is None else world
        self.world.lay_out(config.device_parameters)
        self.requests = Requests(self.world)
        self.counters = Counters()
        self._named_values: dict[str, set[str]] = {}
        self.epoch_means = self.new_means("training_step")
        self.loader_watch = LoaderWatch(self.world.rank)
        self._sample_counter = SampleCounter(type(self).__name__, warns=self.world.is_global_zero)
        self.first_step_done = False
        self.warned_of_no_step = False
        self.moves_batches = (
            self.world.device.type != "cpu" or type(self).move_batch is not BaseTrainer.move_batch
        )
        self.precision_context: Callable[[], AbstractContextManager[Any]] | None = None
        self.random_stream = RandomStream()
        self.random_state_to_resume: dict[str, Any] | None = None
        self.callback_states_to_resume: dict[str, Any] | None = None
        self.evaluation_run: EvaluationRun | None = None
        self._at_end: list[Callable[[], object]] = []
        self._is_configured = False
        self._is_set_up = False
        self._has_fitted = False
        self.has_trained = False
        self._stop_request = self.requests.register("stop")
        self._deadline_s: float | None = None
        self.callbacks = config.callbacks
        self.callbacks.initialize(self)

    # What the user writes

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | Tensor:
        """Forward, `self.backward(loss)`, and `self.step(optimizer)` with the last batch of a step.

        Args:
            batch: From the loader, on this rank's device.
            batch_idx: Index in the epoch, from 0.

        Returns:
            Values to report, such as `{"loss": loss}`, or the loss. Numbers are averaged over an
            epoch, weighted by `num_samples(batch)`, or by their own weight as
            `WeightedMean(value, weight)`. Keys may differ between batches and ranks.
        """

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | Tensor | None:
        """Evaluate a batch, without gradients and in eval mode. Optional.

        Returns:
            Values to report, such as `{"val_loss": loss}`; None if only metrics are updated.
        """
        raise NotImplementedError(
            f"there is a validation loader, and {type(self).__name__} has no validation_step; "
            "write one, or return the training loader alone from configure_dataloaders"
        )

    def num_samples(self, batch: Any) -> float | Tensor:
        """Samples in a batch: its weight in the means over an epoch. Optional to override.

        Called with each batch, before `training_step` and `validation_step`. The default is the
        leading size of the first tensor or array found anywhere in the batch: in tuples, lists,
        mappings and dataclasses. Texts, numbers, tensors without dimensions and other objects are
        passed over. A warning is logged once if there is none, or leading sizes differ.

        Returns:
            A number, at least 0. A tensor with one element stays on its device.
        """
        return self._sample_counter.count(batch)

    def configure_test_dataloaders(self) -> Any:
        """Make the loaders for `test()` without arguments: one, or a dict by name. Optional."""
        raise NotImplementedError(
            f"test() has no data: pass a loader, test(loader), or write {type(self).__name__}"
            ".configure_test_dataloaders"
        )

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | Tensor | None:
        """Evaluate a batch in `test`, without gradients and in eval mode. Optional.

        Default: `validation_step`.

        Returns:
            As `validation_step`.
        """
        written = getattr(self.validation_step, "__func__", None)
        if written is BaseTrainer.validation_step:
            raise NotImplementedError(
                f"{type(self).__name__} has neither a test_step nor a validation_step; write one"
            )
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The model's outputs for a batch in `predict`, without gradients and in eval mode.

        Default: the model's forward, if there is one model. It gets a tensor as it is, the first
        item of a tuple or list, as in (inputs, targets), and the items of a dict as keyword
        arguments.

        Returns:
            A tensor, or tuples, lists and dicts of them, with samples along dimension 0; or a list
            with a value of any kind for each sample.
        """
        return default_prediction(self, batch)

    # What a callback calls that saves weights

    def synchronize_replicas(self) -> None:
        """Take the buffers of the first replica, and check that ranks have equal parameters.

        Called after the first step, before evaluations and saves, and at the end of training; call
        it before anything else that takes one rank's weights for all. Override it if replicas
        differ on purpose, as with local SGD. Collective, with a device sync.

        Raises:
            ReplicaMismatch: On all ranks, if their copies of a parameter differ; it names the first
                one.
        """
        if self.world.is_distributed:
            models = self.named_models()
            broadcast_buffers(models.values(), self.world)
            refuse_different_replicas(models, self.world, f"after step {self.global_step}")

    # Life

    def configure(self) -> None:
        if not self._is_configured:
            self.callbacks.initialize(self)  # another trainer may have attached them since
            loop.configure(self)
            self._is_configured = True

    def setup(self) -> None:
        self.configure()
        if not self._is_set_up:
            self.callbacks.initialize(self)
            loop.setup(self)
            self._is_set_up = True

    def fit(self) -> None:
        """Train; calls `configure` and `setup` first if they haven't run.

        Called again, it continues where it stopped: raise `n_epochs` or `max_steps` first.

        Raises:
            RuntimeError: If a call is running already, or the world is simulated.
            BaseException: The first error of the step, a loader or a callback, after clean-up.
        """
        with self._calling("fit"):
            self.training_parameters.validate()
            if self._has_fitted:  # else a stop in post_setup counts
                self.exception, self.stop_reason = None, None
                self.requests.forget()
            self._has_fitted, self.has_trained = True, False
            loop.fit(self)

    def validate(self, *, checkpoint: CheckpointChoice | None = None) -> dict[str, Any]:
        """Evaluate the validation sets, without training. Collective.

        Calls `configure` and `setup` first if they haven't run. Hooks of validation run; training
        continues afterwards as if it hadn't been called.

        Args:
            checkpoint: Evaluate the weights of "best", "last", a step, or a path of a checkpoint
                or a run, which a CheckpointCallback loads. Afterwards the models have their
                weights again. Another run may be training in the run directory.

        Returns:
            Means over all samples and ranks, and metrics, as `post_validation_epoch` gets them.
            Empty, with a warning, if it was stopped.

        Raises:
            RuntimeError: If there is no validation loader, a call is running already, there is no
                CheckpointCallback for `checkpoint`, or the world is simulated.
            BaseException: The first error of a step, a loader or a callback, after clean-up.
        """
        with self._calling("validate"):
            return evaluation.validate(self, checkpoint)

    def test(
        self, loaders: Any = None, *, checkpoint: CheckpointChoice | None = None
    ) -> dict[str, Any]:
        """Evaluate other loaders with `test_step`, as `validate` does. Collective.

        Args:
            loaders: This rank's loader, or several by name; each any iterable. Default: what
                `configure_test_dataloaders` returns.
            checkpoint: As for `validate`.

        Returns:
            As `validate`.
        """
        with self._calling("test"):
            return evaluation.test(self, loaders, checkpoint)

    def predict(
        self, loader: Any, *, gather: bool = False, checkpoint: CheckpointChoice | None = None
    ) -> list[Any]:
        """Call `predict_step` on each batch of a loader. Collective.

        Calls `configure` and `setup` first if they haven't run. Of the hooks of validation those
        of a step run: there is no result for those of an epoch.

        Args:
            loader: This rank's loader.
            gather: Send all outputs to rank 0, whatever their shapes, in the order of the data
                set. It takes a DataLoader, with any sampler; with one data-parallel rank also a
                stream.
            checkpoint: As for `validate`.

        Returns:
            This rank's outputs, one item per batch. With `gather`, on rank 0, one item per sample
            of the data set, and an empty list on other ranks. Tensors are in host memory. Empty,
            with a warning, if it was stopped.

        Raises:
            ValueError: With `gather`, if the order of samples isn't known, or an output hasn't one
                item per sample.
            BaseException: As `validate`.
        """
        with self._calling("predict"):
            return evaluation.predict(self, loader, checkpoint, gather=gather)

    @contextmanager
    def _calling(self, call: Call) -> Iterator[None]:
        if self.running is not None:
            raise RuntimeError(
                f"{self.running}() is running already; wait for it, or make a second trainer"
            )
        self.world.require_all_ranks(f"{call}()")
        self.callbacks.initialize(self)
        self.running = call
        try:
            yield
        finally:
            self.running = None

    def stop(self, reason: str) -> None:
        if self.world.is_distributed:
            self._stop_request.ask(reason)
        elif self.stop_reason is None and not self.has_trained:
            self.stop_reason = reason

    def request_save(self, reason: str) -> None:
        if self.requests.is_heard("save"):
            self.requests.ask("save", reason)
        else:
            logger.warning(
                "%s asks for a save, and no callback saves: add a CheckpointCallback", reason
            )

    def state_dict(self, *, as_target: bool = False) -> dict[str, Any]:
        return state.state_dict(self, as_target=as_target)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], *, strict: bool = True, resume_data: bool = True
    ) -> None:
        state.load_state_dict(self, state_dict, strict=strict, resume_data=resume_data)

    def at_end(self, function: Callable[[], object]) -> None:
        self._at_end.append(function)

    # What the loop calls

    def seed_generators(self) -> None:
        """Seed all generators: with the config's seed, or a drawn one. Collective."""
        self._seed = self.world.seed(self.config.seed)

    def move_batch(self, batch: Any) -> Any:
        """The batch with its tensors on this rank's device.

        Handles tensors, mappings, sequences, named tuples, dataclasses, SimpleNamespaces, and what
        has a method `to`, nested in any way. Override it for other types; then it is also called
        on the CPU.
        """
        return moved_to(self.world.device, batch)

    def new_means(self, step_name: str) -> EpochMeans:
        """Means of what a step reports, for one epoch."""
        return EpochMeans(step_name, self._named_values.setdefault(step_name, set()))

    def finish_setup(self) -> None:
        """Create what needs models, optimizers and loaders to exist."""
        if self.val_dataloader is not None and not self.validation_sets:
            self.validation_sets = evaluation_sets(self.val_dataloader, "validation", self.world)
        never_validates = self.training_parameters.val_every_n_steps == 0
        written = getattr(self.validation_step, "__func__", None)
        if self.validates and not never_validates and written is BaseTrainer.validation_step:
            self.validation_step(None, 0)  # raises now instead of after an epoch of training
        dtype = self.config.device_parameters.computes_in
        if dtype is not None:
            self.precision_context = functools.partial(
                torch.autocast,
                self.world.device.type,
                dtype=dtype,
                # A copy of each gathered parameter would stay until the end of the step.
                cache_enabled=not self.world.shape.uses_fsdp,
            )
        self.build_optimization()
        self.epoch_schedules = EpochSchedules(self.named_schedules(), self.world)
        if self.world.is_distributed and self.seed is not None:
            self.world.seed_parts(self.seed)  # dropout differs between parts of the data

    @property
    def validates(self) -> bool:
        """Whether there are validation batches."""
        return self.val_dataloader is not None and self.training_parameters.val_steps_per_epoch != 0

    @property
    def num_val_batches(self) -> int | None:
        if self.evaluation_run is None and not self.validation_sets:
            return None
        return (self.evaluation_run or validation_run(self)).num_batches(self.world.rank)

    def end_call(self) -> Exception | None:
        """Call the functions of `at_end`, also if one raises; the first error, if any."""
        first: Exception | None = None
        while self._at_end:
            try:
                self._at_end.pop()()
            except Exception as error:
                logger.exception("a function of at_end failed")
                first = first or error
        return first

    def start_clock(self) -> None:
        """Start the clock of `max_time`."""
        max_time_s = self.training_parameters.max_time
        self._deadline_s = None if max_time_s is None else time.monotonic() + max_time_s

    def receive_requests(self) -> None:
        """Read agreed requests, before the hooks at the end of a step or an evaluated batch."""
        if self.requests.receive():
            self._note_stop()

    def send_requests(self, tick: Tick) -> None:
        """Send this rank's requests to the others, after these hooks. Doesn't block."""
        if self._deadline_s is not None and time.monotonic() > self._deadline_s:
            self._deadline_s = None
            self.stop(f"max_time={self.training_parameters.max_time} s has passed")
        self.requests.send(tick)

    def exchange_requests(self) -> None:
        """Send and read requests at once. Collective, blocking: where ranks synchronize anyway."""
        self.requests.exchange()
        self._note_stop()

    def finish_requests(self) -> None:
        """Read the exchange in flight, after the last step: from now on nothing is stopped."""
        self.requests.finish()
        self.has_trained = True

    def _note_stop(self) -> None:
        if self._stop_request.take():
            reason = self._stop_request.reason()
            self.stop_reason = self.stop_reason or reason
