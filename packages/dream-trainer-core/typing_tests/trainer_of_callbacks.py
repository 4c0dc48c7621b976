"""`self.trainer` has the type that the callback asked for, in each spelling that checkers know."""

from __future__ import annotations

from typing import Any, TypeVar, assert_type

from torch import Tensor, nn

from dream_trainer.callbacks import Callback, RankZeroCallback, intersection
from dream_trainer.testing import TinyTrainer
from dream_trainer.trainer import AbstractTrainer, BaseTrainer, DreamTrainer
from dream_trainer.trainer.mixins import EvalMetricMixin, LoggerMixin


class Plain(Callback):
    def pre_fit(self) -> None:
        assert_type(self.trainer, AbstractTrainer)
        assert_type(self.trainer.global_step, int)


class OfBase(Callback[BaseTrainer]):
    def pre_fit(self) -> None:
        assert_type(self.trainer, BaseTrainer)
        self.trainer.log_scalar("x", 1.0)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


class OfMixin(Callback[LoggerMixin]):
    def pre_fit(self) -> None:
        assert_type(self.trainer, LoggerMixin)
        self.trainer.log_scalar("x", 1.0)
        self.trainer.configure_metrics()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


class OfOwnTrainer(Callback[TinyTrainer]):
    def pre_fit(self) -> None:
        assert_type(self.trainer, TinyTrainer)
        assert_type(self.trainer.config.num_samples, int)
        assert_type(self.trainer.model(Tensor()), Any)


class OfAny(Callback[Any]):
    def pre_fit(self) -> None:
        self.trainer.whatever.it.has()


@intersection
class MetricsAndLogs(EvalMetricMixin, LoggerMixin): ...


class OfIntersection(Callback[MetricsAndLogs]):
    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        assert_type(self.trainer, MetricsAndLogs)
        for name, metric in self.trainer.named_metrics().items():
            self.trainer.log_scalar(f"val/{name}", metric.compute())
        self.trainer.no_such_thing()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


# The guide's `A & B` works at run time; the type system has no intersections, so that checkers
# refuse it in an annotation and take `@intersection` instead.
class OfBoth(Callback[EvalMetricMixin & LoggerMixin]): ...  # type: ignore[misc]  # pyright: ignore[reportInvalidTypeArguments]


class OfRankZero(RankZeroCallback[DreamTrainer]):
    def post_setup(self) -> None:
        assert_type(self.trainer, DreamTrainer)
        for name, model in self.trainer.named_models().items():
            assert_type(name, str)
            assert_type(model, nn.Module)


class OfPlainRankZero(RankZeroCallback):
    def pre_fit(self) -> None:
        assert_type(self.trainer, AbstractTrainer)


LoggingT = TypeVar("LoggingT", bound=LoggerMixin)


class Generic(Callback[LoggingT]):
    def pre_fit(self) -> None:
        assert_type(self.trainer, LoggingT)
        self.trainer.log_dict({"x": 1.0})


class OfGeneric(Generic[DreamTrainer]):
    def pre_epoch(self) -> None:
        assert_type(self.trainer, DreamTrainer)


class NotATrainer(Callback[int]): ...  # type: ignore[type-var]  # pyright: ignore[reportInvalidTypeArguments]


# Progress is for the loop alone to change.


class Assigns(Callback[BaseTrainer]):
    def pre_epoch(self) -> None:
        self.trainer.global_step = 3  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
        self.trainer.current_epoch += 1  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
        self.trainer.local_batches = 0  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
        self.trainer.is_accumulating_gradients = True  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
        self.trainer.num_train_batches = 3  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
        self.trainer.experiment = "other"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
