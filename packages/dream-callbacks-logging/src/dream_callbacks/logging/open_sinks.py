"""The sinks that a run logs to: choosing, opening and closing them together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dream_callbacks.logging.mixin import WandBLoggerMixin
from dream_callbacks.logging.sinks.base import DeferredSink, LoggedRun, OpenedSink
from dream_callbacks.logging.sinks.jsonl import JSONLinesSink
from dream_callbacks.logging.sinks.wandb import WandBSink
from dream_trainer.configs import LoggingParameters, WandbLoggingParameters
from dream_trainer.trainer import DreamTrainerConfig
from dream_trainer.trainer.mixins import LoggerMixin, Sink
from dream_trainer.world import RankFailure

logger = logging.getLogger(__name__)

AnySink = DeferredSink | Sink

_METHODS = ("log_scalars", "log_images", "log_videos", "log_plot", "log_config", "log_code")


def checked_sinks(sinks: Any) -> list[AnySink]:
    """Validate `sinks` and return them as a list.

    Raises:
        TypeError: If `sinks` isn't a list or tuple, or an item is neither a DeferredSink nor has
            the methods of a sink.
    """
    if not isinstance(sinks, (list, tuple)):
        raise TypeError(f"sinks={sinks!r}: a list of sinks is required: sinks=[{sinks!r}]")
    for sink in sinks:
        is_sink = isinstance(sink, DeferredSink) or all(
            callable(getattr(sink, name, None)) for name in _METHODS
        )
        if isinstance(sink, type) or not is_sink:
            hint = "; it is a class, add () to create one" if isinstance(sink, type) else ""
            raise TypeError(
                f"{sink!r} isn't a sink{hint}; a DeferredSink such as JSONLinesSink() is required, "
                f"or an object with {', '.join(_METHODS)}"
            )
    return list(sinks)


def planned_sinks(sinks: Sequence[AnySink] | None, trainer: LoggerMixin) -> list[AnySink]:
    """The sinks that a run will log to.

    Args:
        sinks: `sinks` of LoggerCallback; None selects by the trainer and its config.
        trainer: The trainer that runs.
    """
    planned: list[AnySink] = list(sinks or ())
    if sinks is None and _uses_wandb(trainer):
        planned.append(WandBSink())
    deferred = [sink for sink in planned if isinstance(sink, DeferredSink)]
    is_at_risk = bool(deferred) and not any(sink.survives_crash for sink in deferred)
    if sinks is None or is_at_risk:
        planned.insert(0, JSONLinesSink())
    return planned


def logged_run(trainer: LoggerMixin) -> LoggedRun:
    """The run that a trainer trains, as sinks know it."""
    return LoggedRun(
        project=trainer.project,
        group=trainer.group,
        experiment=trainer.experiment,
        run_dir=trainer.run_dir,
        step=trainer.global_step,
    )


class OpenSinks:
    """Sinks that are open and added to a trainer.

    Args:
        trainer: The trainer that they are added to.
    """

    def __init__(self, trainer: LoggerMixin) -> None:
        self._trainer = trainer
        self._opened: list[OpenedSink] = []
        self._added: list[Sink] = []

    @classmethod
    def open(
        cls, sinks: Sequence[AnySink] | None, trainer: LoggerMixin, run: LoggedRun | None = None
    ) -> OpenSinks:
        """Open the sinks on global rank 0 and add them to the trainer. Collective.

        Args:
            sinks: `sinks` of LoggerCallback.
            trainer: The trainer that runs.
            run: What to open them for. Default: the run that the trainer trains.

        Raises:
            RankFailure: On all ranks, if a sink can't be opened; those already opened are closed.
                In a world of one, the sink's own error.
        """
        opened = cls(trainer)

        def open_all() -> None:
            try:
                opened._open_all(planned_sinks(sinks, trainer), run or logged_run(trainer))
            except BaseException:
                opened.close()
                raise

        try:
            trainer.world.on_rank_zero(open_all)
        except RankFailure as error:
            raise RankFailure(f"the log couldn't be opened: {error}") from error.__cause__
        return opened

    def close(self) -> None:
        """Remove the sinks from the trainer and close those that were opened here."""
        for sink in self._added:
            if sink in self._trainer.sinks:
                self._trainer.remove_sink(sink)
        self._added.clear()
        while self._opened:
            sink = self._opened.pop()
            try:
                sink.close(self._trainer.exception)
            except Exception:
                logger.exception("%s couldn't be closed", type(sink).__name__)
            except BaseException:  # Ctrl-C, or another rank has failed
                self.close()  # the remaining sinks
                raise

    def _open_all(self, sinks: Sequence[AnySink], run: LoggedRun) -> None:
        for sink in sinks:
            if isinstance(sink, DeferredSink):
                opened = sink.open(run)
                self._opened.append(opened)
                self._add(opened)
            else:
                self._add(sink)

    def _add(self, sink: Sink) -> None:
        self._trainer.add_sink(sink)
        self._added.append(sink)


def _uses_wandb(trainer: LoggerMixin) -> bool:
    config = trainer.config
    parameters = (
        config.logging_parameters if isinstance(config, DreamTrainerConfig) else LoggingParameters()
    )
    return parameters.enabled and (
        isinstance(parameters, WandbLoggingParameters) or isinstance(trainer, WandBLoggerMixin)
    )
