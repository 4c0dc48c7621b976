"""Callback: overridden hooks are called, wherever they are defined; copies are not attached."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from recording import Recorder
from torch import nn

import dream_trainer.callbacks.callback as callback_module
from dream_trainer.callbacks import Callback, CallbackCollection, RankZeroCallback
from dream_trainer.callbacks.callback import HOOKS
from dream_trainer.testing import TinyTrainer, tiny_config

# Overridden hooks


def test_a_users_class_called_callback_runs(tmp_path: Path) -> None:
    base = Callback

    def make() -> Any:
        class Callback(base[Any]):  # type: ignore[misc,valid-type]  # the name is the point
            steps = 0

            def post_train_step(self, result: Any, batch_idx: int) -> None:
                self.steps += 1

        return Callback()

    callback = make()
    TinyTrainer(tiny_config(tmp_path, [callback], max_steps=2)).fit()

    assert type(callback).__name__ == "Callback"
    assert callback.steps == 2


def test_a_hook_assigned_to_an_instance_runs(tmp_path: Path) -> None:
    seen: list[int] = []
    callback: Callback[Any] = Callback()
    callback.post_train_step = lambda result, batch_idx: seen.append(batch_idx)  # type: ignore[method-assign]
    TinyTrainer(tiny_config(tmp_path, [callback], max_steps=2)).fit()

    assert seen == [0, 1]


def test_a_hook_restored_to_that_of_callback_is_not_called() -> None:
    class Mine(Callback[Any]):
        def post_fit(self) -> None: ...

    class Quiet(Mine):
        post_fit = Callback.post_fit

    assert CallbackCollection([Quiet()]).plan().hooks == {}


def test_inherited_hooks_and_hooks_of_mixins_run(tmp_path: Path) -> None:
    class Timing:
        def post_train_step(self, result: Any, batch_idx: int) -> None:
            self.steps = batch_idx + 1

    class Base(Timing, Callback[Any]): ...

    class Mine(Base): ...

    callback = Mine()
    TinyTrainer(tiny_config(tmp_path, [callback], max_steps=3)).fit()

    assert callback.steps == 3


def test_a_callback_may_be_a_module(tmp_path: Path) -> None:
    class Probe(nn.Module, Callback[Any]):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def post_fit(self) -> None:
            self.scale.data += 1

    probe = Probe()
    trainer = TinyTrainer(tiny_config(tmp_path, [probe], max_steps=1))
    trainer.fit()
    state = trainer.callbacks.state_dict()
    other = CallbackCollection([Probe()])
    other.load_state_dict(state)

    assert state["Probe"] == {"scale": torch.tensor(2.0)}
    assert other["Probe"].scale == 2  # type: ignore[attr-defined]  # a Probe


# The list of hooks


def test_hooks_are_those_of_the_contract_in_the_order_of_a_run(tmp_path: Path) -> None:
    recorder = Recorder(fail_in="post_epoch")
    with pytest.raises(ValueError, match="planned"):
        TinyTrainer(tiny_config(tmp_path, [recorder])).fit()
    events = dict.fromkeys(event.removeprefix("enter ") for event in recorder.events)

    assert [event for event in events if not event.startswith("exit ")] == list(HOOKS)
    assert HOOKS["post_train_step"] == ("result", "batch_idx")
    assert HOOKS["pre_optimizer_step"] == ("model", "optimizer")
    assert HOOKS["on_exception"] == ("exception",)


def test_the_annotated_loop_shows_every_hook() -> None:
    text = callback_module.__doc__ or ""

    for hook, arguments in HOOKS.items():
        call = f"{hook}({', '.join(arguments)})" if arguments else hook
        assert call in text, hook


def replacing(hook: str, replacement: Any) -> Callback[Any]:
    """A callback with one hook that returns `replacement(batch)`."""

    def replace(self: Any, batch: Any, batch_idx: int) -> Any:
        return replacement(batch)

    cls: Any = type("Replaces", (Callback,), {hook: replace})
    return cast(Callback[Any], cls())


@pytest.mark.parametrize(
    ("hook", "step"),
    [("pre_train_step", "training_step"), ("pre_validation_step", "validation_step")],
)
def test_a_batch_returned_by_a_hook_replaces_it(tmp_path: Path, hook: str, step: str) -> None:
    seen: list[Any] = []

    def see(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append(batch)
        return getattr(TinyTrainer, step)(self, batch, batch_idx)

    trainer_class: Any = type("Sees", (TinyTrainer,), {step: see})
    keeps, doubles = replacing(hook, seen.append), replacing(hook, lambda b: (b[0] * 2, b[1]))
    callbacks = [keeps, doubles, replacing(hook, seen.append)]
    trainer_class(tiny_config(tmp_path, callbacks, max_steps=1, val_steps_per_epoch=1)).fit()
    before, after, in_step = seen

    assert torch.equal(after[0], before[0] * 2)
    assert in_step is after


# Copies


def test_copies_and_pickles_are_not_attached(tmp_path: Path) -> None:
    recorder = Recorder()
    TinyTrainer(tiny_config(tmp_path, [recorder], max_steps=1)).setup()

    copies = (
        copy.copy(recorder),
        copy.deepcopy(recorder),
        pickle.loads(pickle.dumps(recorder)),
    )

    assert recorder.trainer is not None
    for each in copies:
        assert each.events == ["pre_launch", *recorder.events[1:]]
        assert not hasattr(each, "trainer")


def test_a_rank_zero_callback_is_a_callback_with_requirements() -> None:
    class Mine(RankZeroCallback[TinyTrainer]): ...

    assert Mine.requirements() == (TinyTrainer,)
