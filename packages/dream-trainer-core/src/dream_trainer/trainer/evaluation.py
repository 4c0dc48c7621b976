"""Evaluation without training: `validate`, `test` and `predict`, as functions of a trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from dream_trainer.interface.weights_source import CheckpointChoice, WeightsSource
from dream_trainer.trainer import optimizer_modes
from dream_trainer.trainer.evaluation_sets import evaluation_sets
from dream_trainer.trainer.loop import failing_cleanly
from dream_trainer.trainer.predictions import Predictions
from dream_trainer.trainer.state import training_state_kept
from dream_trainer.trainer.validation import (
    EvaluationRun,
    evaluate,
    evaluate_set,
    evaluating,
)
from dream_trainer.world import signals
from dream_trainer.world.dtensors import local_part

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

T = TypeVar("T")

logger = logging.getLogger(__name__)


def validate(trainer: BaseTrainer, checkpoint: CheckpointChoice | None) -> dict[str, Any]:
    """Evaluate the validation sets."""

    def validated() -> dict[str, Any] | None:
        if not trainer.validation_sets:
            raise RuntimeError(
                "validate() has no data: there is no validation loader; return (training loader, "
                "validation loader) from configure_dataloaders, or use test(loader)"
            )
        run = EvaluationRun(
            trainer.validation_sets,
            trainer.validation_step,
            "validation_step",
            trainer.training_parameters.val_steps_per_epoch or None,
        )
        return _evaluated_with_hooks(trainer, run)

    return _called(trainer, checkpoint, validated) or {}


def test(trainer: BaseTrainer, loaders: Any, checkpoint: CheckpointChoice | None) -> dict[str, Any]:
    """Evaluate the sets of some loaders with `test_step`."""

    def tested() -> dict[str, Any] | None:
        given = trainer.configure_test_dataloaders() if loaders is None else loaders
        sets = evaluation_sets(given, "test", trainer.world)
        run = EvaluationRun(sets, trainer.test_step, "test_step")
        return _evaluated_with_hooks(trainer, run)

    return _called(trainer, checkpoint, tested) or {}


def predict(
    trainer: BaseTrainer, loader: Any, checkpoint: CheckpointChoice | None, *, gather: bool
) -> list[Any]:
    """Call `predict_step` on the batches of a loader."""

    def predicted() -> list[Any] | None:
        predictions = Predictions(trainer.world, loader, gather=gather)
        (only,) = evaluation_sets({"": predictions.loader}, "predict", trainer.world)
        run = EvaluationRun((only,), trainer.predict_step, "predict_step")
        with evaluating(trainer, run):
            is_complete = evaluate_set(trainer, run, only, predictions.add)
        return predictions.finish() if is_complete else None

    return _called(trainer, checkpoint, predicted) or []


def _evaluated_with_hooks(trainer: BaseTrainer, run: EvaluationRun) -> dict[str, Any] | None:
    trainer.evaluation_run = run
    try:
        trainer.callbacks.pre_validation_epoch()
        result = evaluate(trainer, run)
        if result is not None:
            trainer.callbacks.post_validation_epoch(result)
    finally:
        trainer.evaluation_run = None
    return result


def _called(
    trainer: BaseTrainer, checkpoint: CheckpointChoice | None, function: Callable[[], T | None]
) -> T | None:
    """Set up, and call a function with signals, errors and stops handled as in `fit`.

    Returns:
        What it returns; None if it was stopped.
    """
    trainer.exception = None
    trainer.setup()
    with signals.handled_by(trainer), failing_cleanly(trainer):
        monitor = trainer.world.failure_monitor()
        with (
            _stops_kept(trainer),
            trainer.random_stream.peeked(),
            trainer.train_batches.generators_kept(),
            trainer.loader_watch.watching(),
            training_state_kept(trainer),
            _weights_of(trainer, checkpoint),
        ):
            trainer.requests.start()
            result = function()
            if result is None and trainer.world.is_global_zero:
                logger.warning("%s() was stopped: %s", trainer.running, trainer.stop_reason)
            trainer.finish_requests()
        error = trainer.end_call()
        if error is not None:
            raise error
        monitor.finish()
    signals.raise_received_signal()
    return result


@contextmanager
def _stops_kept(trainer: BaseTrainer) -> Iterator[None]:
    """Inside, a stop ends the evaluation; it has no effect on the next `fit`."""
    before = trainer.stop_reason, trainer.has_trained
    trainer.stop_reason, trainer.has_trained = None, False
    trainer.requests.forget()
    try:
        yield
    finally:
        trainer.requests.forget()
        trainer.stop_reason, trainer.has_trained = before


@contextmanager
def _weights_of(trainer: BaseTrainer, checkpoint: CheckpointChoice | None) -> Iterator[None]:
    """Inside, the models have the weights of a checkpoint, and the counters are its.

    Memory: a copy of this rank's part of the models on the host.
    """
    if checkpoint is None:
        yield
        return
    optimizer_modes.refuse_other_weights(trainer.named_optimizers().values())
    source = next((c for c in trainer.callbacks if isinstance(c, WeightsSource)), None)
    if source is None:
        raise RuntimeError(
            f"{trainer.running}(checkpoint={checkpoint!r}) needs a callback that loads "
            "checkpoints; add a CheckpointCallback"
        )
    kept = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _local_tensors(trainer)]
    counters = trainer.counters
    try:
        trainer.counters = source.load_for_evaluation(checkpoint)
        yield
    finally:
        trainer.counters = counters
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)


def _local_tensors(trainer: BaseTrainer) -> Iterator[Tensor]:
    """This rank's part of each parameter and buffer."""
    for model in trainer.named_models().values():
        for tensor in (*model.parameters(), *model.buffers()):
            yield local_part(tensor)
