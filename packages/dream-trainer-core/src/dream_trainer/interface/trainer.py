"""AbstractTrainer: the interface that callbacks use."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Never, NoReturn

from dream_trainer.configs.checked_fields import CheckedNames
from dream_trainer.configs.device import DeviceParameters
from dream_trainer.interface.intersection import TrainerMeta
from dream_trainer.interface.lr_schedule import LRSchedule
from dream_trainer.world.requests import Requests
from dream_trainer.world.world import World

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from dream_trainer.callbacks.collection import CallbackCollection


def script_name() -> str:
    """Name of the running script without suffix; "run" if there is none."""
    name = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else ""
    return name if re.fullmatch(r"\w[\w.-]*", name) and name != "ipykernel_launcher" else "run"


def checked_name(name: object, field_name: str) -> str:
    """The name in Unicode normal form NFC, if it is a valid name of one folder.

    Raises:
        ValueError: If it isn't: it would lead out of the run directory, or be refused by file
            systems.
    """
    normal = unicodedata.normalize("NFC", name) if isinstance(name, str) else ""
    if (
        not normal.strip()
        or normal in (".", "..")
        or len(normal.encode()) > 200
        or not normal.isprintable()
        or set(normal) & set("/\\:")
    ):
        raise ValueError(
            f"{field_name}={name!r} can't name a folder: 1 to 200 bytes of printable text "
            "without '/', '\\' or ':' are required, and neither '.' nor '..'"
        )
    return normal


def check_kind(config: object, field_name: str, kind: type, example: str) -> None:
    """Check the type of a config field.

    Raises:
        TypeError: If the value isn't a `kind`; it shows `example`.
    """
    value = getattr(config, field_name)
    if not isinstance(value, kind):
        raise TypeError(
            f"{field_name}={value!r:.80}: a {kind.__name__} is required, not a "
            f"{type(value).__name__}; write {field_name}={example}"
        )


@dataclass(kw_only=True)
class AbstractTrainerConfig(CheckedNames):
    """Names, run directory, seed and device of a run.

    Args:
        project: First folder of the run directory, and the project in an experiment tracker.
        group: Second folder: related runs.
        experiment: Third folder: one run. A script started again with the same names resumes.
            Default: the name of the script.
        root_dir: Parent of all run directories: a directory, not a URL.
        seed: Seed of all random number generators. None draws one, the same on all ranks.
        device_parameters: Device, layout and precision.
        debug: Check for mistakes that would hang or corrupt a run, with some overhead per hook.
            Default: whether the environment has DREAM_TRAINER_DEBUG=1.

    Raises:
        ValueError: If a name can't be that of a folder, or `root_dir` is a URL.
        TypeError: If `device_parameters` has the wrong type.
    """

    project: str = "dream-trainer"
    group: str = "default"
    experiment: str = field(default_factory=script_name)
    root_dir: str | Path = "runs"
    seed: int | None = 42
    device_parameters: DeviceParameters = field(default_factory=DeviceParameters)
    debug: bool = field(default_factory=lambda: os.environ.get("DREAM_TRAINER_DEBUG") == "1")

    def __post_init__(self) -> None:
        for name in ("project", "group", "experiment"):
            setattr(self, name, checked_name(getattr(self, name), name))
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(self.root_dir)):  # pathlib drops a slash
            raise ValueError(
                f"root_dir={str(self.root_dir)!r} is a URL; a directory is required, since logs, "
                "traces and tables are written there; what can write to a URL has a setting of "
                "its own, such as CheckpointParameters(root_dir=…)"
            )
        check_kind(self, "device_parameters", DeviceParameters, "DeviceParameters(…)")


@dataclass(slots=True)
class Counters:
    """Progress of training. A checkpoint has exactly these.

    Args:
        global_step: Optimizer steps completed.
        current_epoch: Index of the current or next epoch, from 0.
        epoch_stage: Progress in that epoch: "train" until its last batch, "validate" until its
            validation is done, then "end".
        epoch_batches: Training batches completed in that epoch.
        local_batches: Training batches that this rank has processed in total.
        validated_step: `global_step` at the last validation run; -1 before the first.
    """

    global_step: int = 0
    current_epoch: int = 0
    epoch_stage: Literal["train", "validate", "end"] = "train"
    epoch_batches: int = 0
    local_batches: int = 0
    validated_step: int = -1


Call = Literal["fit", "validate", "test", "predict"]
"""A call that runs the loop."""


class AbstractTrainer(metaclass=TrainerMeta):
    """The interface of trainers for callbacks.

    Attributes:
        config: As passed by the user.
        callbacks: The callbacks of this trainer; may be changed at any time.
        world: Ranks, device, mesh and collectives.
        counters: Progress of training; only the loop changes them.
        requests: Requests of any rank to all ranks, without blocking a step.
    """

    config: AbstractTrainerConfig
    callbacks: CallbackCollection
    world: World
    counters: Counters
    requests: Requests

    # Identity. Names are checked again, since they may have been assigned.

    @property
    def project(self) -> str:
        return checked_name(self.config.project, "project")

    @property
    def group(self) -> str:
        return checked_name(self.config.group, "group")

    @property
    def experiment(self) -> str:
        return checked_name(self.config.experiment, "experiment")

    @property
    def run_dir(self) -> Path:
        """Directory of everything that the run writes. Created when something is written."""
        return Path(self.config.root_dir) / self.project / self.group / self.experiment

    # Progress; only the loop changes it

    @property
    def global_step(self) -> int:
        """Optimizer steps completed, including those before resuming."""
        return self.counters.global_step

    @global_step.setter
    def global_step(self, value: Never) -> None:
        _refuse_assignment("global_step", value)

    @property
    def current_epoch(self) -> int:
        """Index of the current or next epoch, from 0."""
        return self.counters.current_epoch

    @current_epoch.setter
    def current_epoch(self, value: Never) -> None:
        _refuse_assignment("current_epoch", value)

    @property
    def local_batches(self) -> int:
        """Training batches that this rank has processed, including those before resuming."""
        return self.counters.local_batches

    @local_batches.setter
    def local_batches(self, value: Never) -> None:
        _refuse_assignment("local_batches", value)

    @property
    @abstractmethod
    def is_accumulating_gradients(self) -> bool:
        """Whether this batch isn't the last of its optimizer step."""

    @property
    @abstractmethod
    def num_train_batches(self) -> int | None:
        """Training batches in an epoch on this rank; None until the loaders exist."""

    @property
    @abstractmethod
    def num_val_batches(self) -> int | None:
        """Batches in a validation run on this rank, over all sets; None if unknown.

        While another evaluation runs (a sanity validation, `test`, `predict`), those of that run.
        """

    running: Call | None = None
    """The call that is in progress, with the set-up that it begins with; None between calls."""

    is_sanity_validating: bool = False
    """Whether a validation run is the one that `num_sanity_val_steps` asks for."""

    validation_set: str | None = None
    """Name of the set that is being evaluated; None if it has none, and outside of its batches."""

    @abstractmethod
    def num_samples(self, batch: Any) -> float | Tensor:
        """Samples in a batch: its weight in the means over an epoch."""

    # Ending

    exception: BaseException | None = None
    """The error that ends the run, while callbacks clean up."""

    stop_reason: str | None = None
    """Why training stops early; None if it doesn't."""

    @abstractmethod
    def stop(self, reason: str) -> None:
        """End training, on all ranks after the same optimizer step.

        With one rank after the current step; with several, after the step at which all of them
        know, within one second or two steps, whichever is longer. A validation stops after its
        current batch, and is repeated when the run is resumed. `post_fit` is called as usual.

        May be called on any rank, in any hook, in another thread and in a signal handler. Not
        collective. The first reason is kept.
        """

    @abstractmethod
    def request_save(self, reason: str) -> None:
        """Request a save after a step, on all ranks, as SIGUSR1 does.

        May be called where `stop` may, and takes effect as soon. Not collective.
        """

    def at_end(self, function: Callable[[], object]) -> None:
        """Call a function once, when the call in progress ends, also after an error or a stop.

        `post_fit` is the place for what `pre_fit` began; this one is for what a hook of validation
        begins, which may run in `validate`, `test` and `predict` too. The last one is called
        first, after `post_fit`. Not collective.
        """
        raise NotImplementedError(f"{type(self).__name__} has no calls to wait for the end of")

    # Parts

    @abstractmethod
    def named_models(self) -> Mapping[str, nn.Module]:
        """Models by the attribute that they were assigned to in `configure_models`."""

    @abstractmethod
    def named_optimizers(self) -> Mapping[str, Optimizer]:
        """Optimizers by name."""

    @abstractmethod
    def named_schedulers(self) -> Mapping[str, LRScheduler]:
        """Learning rate schedulers by name; not those that are parts of others."""

    def named_schedules(self) -> Mapping[str, LRSchedule]:
        """Learning rate schedulers by name, with when they are stepped, and their optimizer."""
        return {
            name: LRSchedule(scheduler, optimizer=scheduler.optimizer)
            for name, scheduler in self.named_schedulers().items()
        }

    @abstractmethod
    def models_of(self, optimizer: Optimizer) -> Mapping[str, nn.Module]:
        """The models whose parameters an optimizer updates, by name."""

    @abstractmethod
    def model_of(self, optimizer: Optimizer) -> nn.Module:
        """The model whose parameters an optimizer updates; the first, if there are several."""

    @property
    @abstractmethod
    def train_dataloader(self) -> Iterable[Any]:
        """The training loader of this rank.

        Raises:
            RuntimeError: If `setup` hasn't run.
        """

    @property
    @abstractmethod
    def val_dataloader(self) -> Iterable[Any] | Mapping[str, Iterable[Any]] | None:
        """The validation loader of this rank, if there is one; if there are several, by name.

        Raises:
            RuntimeError: If `setup` hasn't run.
        """

    # State

    @abstractmethod
    def model_state_dict(self) -> dict[str, Any]:
        """Tensors to save, by model and parameter name; sharded where the model is."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume. Collective: each rank must call it."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state. Collective: each rank must call it."""

    # Life

    @abstractmethod
    def configure(self) -> None:
        """Launch the world and build the models' structure."""

    @abstractmethod
    def setup(self) -> None:
        """Materialize and shard the models; build loaders, optimizers and schedulers."""

    @abstractmethod
    def fit(self) -> None:
        """Train; calls `configure` and `setup` first if they haven't run."""

    # Called by the loop, implemented by mixins

    @abstractmethod
    def build_models(self) -> None:
        """Build the models' structure: part of `configure`."""

    @abstractmethod
    def build_training(self) -> None:
        """Build what the first batch needs: part of `setup`."""

    def build_metrics(self) -> None:
        """Build the metrics, if there are any: part of `setup`."""

    def named_metrics(self) -> Mapping[str, Any]:
        """Metrics by name."""
        return {}

    def reset_metrics(self) -> None:
        """Reset the metrics, before a validation run."""

    def compute_metrics(self) -> dict[str, Any]:
        """Values of the metrics, after a validation run."""
        return {}

    def reset_train_metrics(self) -> None:
        """Reset the metrics of training, before an epoch."""

    def compute_train_metrics(self) -> dict[str, Any]:
        """Values of the metrics of training, after an epoch."""
        return {}

    def train_metrics_state_dict(self) -> dict[str, Any]:
        """State of the metrics of training on this rank, in the middle of an epoch."""
        return {}

    def load_train_metrics_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `train_metrics_state_dict` returned."""


def _refuse_assignment(name: str, value: object) -> NoReturn:
    raise AttributeError(
        f"trainer.{name} = {value!r}: only the loop changes {name}, so that a resumed run "
        "counts correctly; keep your own counter in the callback and return it from "
        "state_dict(), or call trainer.stop(reason) to end training"
    )
