"""CallbackCollection takes any mix of callbacks; a wrong argument in a dispatch is an error."""

from __future__ import annotations

from typing import Any, assert_type

from torch import nn
from torch.optim import Optimizer

from dream_trainer.callbacks import Callback, CallbackCollection, RankZeroCallback, intersection
from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.trainer import BaseTrainer, DreamTrainer, DreamTrainerConfig
from dream_trainer.trainer.mixins import EvalMetricMixin, LoggerMixin


class OfBase(Callback[BaseTrainer]): ...


class OfDream(RankZeroCallback[DreamTrainer]): ...


class OfTiny(Callback[TinyTrainer]): ...


@intersection
class Both(EvalMetricMixin, LoggerMixin): ...


class OfBoth(Callback[Both]): ...


class Plain(Callback): ...


# Any mix, in each way of giving them

callbacks = CallbackCollection([OfBase(), OfDream(), OfTiny(), OfBoth(), Plain()])
assert_type(callbacks, CallbackCollection)
assert_type(DreamTrainerConfig(callbacks=[OfBase(), OfDream()]).callbacks, CallbackCollection)
DreamTrainerConfig(callbacks={"a": OfBase()})
DreamTrainerConfig(callbacks=[3])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
CallbackCollection()
CallbackCollection({"a": OfBase(), "b": OfDream()})
CallbackCollection([("a", OfBase()), ("b", OfDream()), Plain()])
CallbackCollection(callbacks)
CallbackCollection(callback for callback in callbacks)
DreamTrainerConfig(callbacks=CallbackCollection([OfTiny(), OfBoth()]))
tiny_config("runs", [OfBase(), OfDream()], max_steps=3)
some: list[Callback[Any]] = [OfBase(), OfTiny()]
CallbackCollection(some)

CallbackCollection([OfBase, OfDream()])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType, reportCallIssue]
CallbackCollection(["OfBase"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType, reportCallIssue]
CallbackCollection(OfBase())  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]

# The mapping

assert_type(callbacks["OfBase"], Callback[Any])
assert_type(callbacks.get("OfBase"), Callback[Any] | None)
assert_type(callbacks.pop("OfBase"), Callback[Any])
assert_type(callbacks.pop("OfBase", None), Callback[Any] | None)
assert_type(len(callbacks), int)
for callback in callbacks:
    assert_type(callback, Callback[Any])
for name, callback in callbacks.items():
    assert_type(name, str)
callbacks["mine"] = OfBoth()
callbacks |= {"yours": Plain()}
callbacks |= CallbackCollection([OfTiny()])
callbacks.append(OfDream(), name="dream")
del callbacks["mine"]
assert_type("mine" in callbacks, bool)
callbacks[3] = Plain()  # type: ignore[index]  # pyright: ignore[reportArgumentType]
callbacks["mine"] = Plain  # type: ignore[assignment]  # pyright: ignore[reportArgumentType]
callbacks.append("mine")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

# The dispatch, as the loop writes it


def dispatch(callbacks: CallbackCollection, model: nn.Module, optimizer: Optimizer) -> None:
    callbacks.pre_fit()
    callbacks.post_train_step({}, 0)
    assert_type(callbacks.pre_train_step(3, 0), Any)
    callbacks.pre_optimizer_step(model, optimizer)
    callbacks.post_train_epoch({"loss": 1.0})
    callbacks.on_exception(ValueError())
    assert_type(callbacks.post_fit(), BaseException | None)
    if callbacks.train_context is not None:
        with callbacks.train_context():
            pass

    callbacks.post_train_step(1)  # type: ignore[call-arg, arg-type, misc]  # pyright: ignore[reportCallIssue]
    callbacks.post_train_step(0, {})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    callbacks.pre_fit(3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    callbacks.pre_optimizer_step(optimizer, model)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    callbacks.post_train_epoch()  # type: ignore[call-arg, misc]  # pyright: ignore[reportCallIssue]
    callbacks.on_exception("text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    callbacks.post_train_stp({}, 0)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    callbacks.train_context()  # type: ignore[misc]  # pyright: ignore[reportOptionalCall]
