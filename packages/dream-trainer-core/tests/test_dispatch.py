"""Dispatch: arguments, contexts, notes on errors, and the guard against collectives."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from recording import Recorder

from dream_trainer.callbacks import Callback, CallbackCollection, RankZeroCallback
from dream_trainer.callbacks.callback import CONTEXTS, HOOKS
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config

# Arguments


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in (*CONTEXTS, "post_fit")])
@pytest.mark.parametrize("num_callbacks", [0, 1, 3])
def test_each_hook_passes_its_arguments_to_each_callback(hook: str, num_callbacks: int) -> None:
    arguments = tuple(object() for _ in HOOKS[hook])
    recorders = [Recorder() for _ in range(num_callbacks)]
    getattr(CallbackCollection(recorders), hook)(*arguments)

    assert all(recorder.arguments == {hook: [arguments]} for recorder in recorders)


@pytest.mark.parametrize("hook", ["pre_train_step", "pre_validation_step"])
def test_the_batch_goes_through_all_callbacks(hook: str) -> None:
    def appending(item: str | None) -> Any:
        def append(self: Any, batch: list[str], batch_idx: int) -> list[str] | None:
            return None if item is None else [*batch, item]

        return type("Appends", (Callback,), {hook: append})()

    assert getattr(CallbackCollection([]), hook)(["x"], 0) == ["x"]
    collection = CallbackCollection([appending("a"), appending(None), appending("b")])
    assert getattr(collection, hook)(["x"], 0) == ["x", "a", "b"]


def test_a_batch_may_be_replaced_by_something_falsy() -> None:
    class Empties(Callback[Any]):
        def pre_train_step(self, batch: Any, batch_idx: int) -> Any:
            return []

    assert CallbackCollection([Empties()]).pre_train_step([1], 0) == []


# Contexts


class Around(Callback[Any]):
    def __init__(self, name: str, events: list[str]) -> None:
        self.name = name
        self.events = events

    @contextlib.contextmanager
    def train_context(self) -> Iterator[None]:
        self.events.append(f"enter {self.name}")
        try:
            yield
        finally:
            self.events.append(f"exit {self.name}")


@pytest.mark.parametrize("names", ["a", "abc"])
def test_contexts_nest_with_the_first_outermost(names: str) -> None:
    events: list[str] = []
    context = CallbackCollection([Around(name, events) for name in names]).train_context
    assert context is not None
    for _ in range(2):
        with context():
            events.append("step")

    once = [*(f"enter {n}" for n in names), "step", *(f"exit {n}" for n in reversed(names))]
    assert events == once * 2


def test_without_context_hooks_the_context_is_none() -> None:
    collection = CallbackCollection([Recorder()])
    assert collection.train_context is not None

    del collection["Recorder"]
    assert collection.train_context is None
    assert collection.validation_context is None


def test_contexts_are_left_when_the_step_fails(tmp_path: Path) -> None:
    events: list[str] = []

    class Fails(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ZeroDivisionError

    callbacks = [Around("a", events), Around("b", events)]
    with pytest.raises(ZeroDivisionError):
        Fails(tiny_config(tmp_path, callbacks)).fit()

    assert events == ["enter a", "enter b", "exit b", "exit a"]


@pytest.mark.parametrize("num_others", [0, 1])
def test_a_context_hook_that_returns_no_context_is_refused(num_others: int) -> None:
    events: list[str] = []

    class Mine(Callback[Any]):
        def train_context(self) -> Any:
            return iter([None])

    others = [Around("other", events) for _ in range(num_others)]
    context = CallbackCollection([*others, Mine()]).train_context
    assert context is not None
    with (
        pytest.raises(
            TypeError, match=r"Mine\.train_context returned a list_iterator.*@contextlib"
        ),
        context(),
    ):
        events.append("step")

    assert events == ["enter other", "exit other"] * num_others


@pytest.mark.parametrize("when", ["call", "enter", "exit"])
@pytest.mark.parametrize("num_others", [0, 1])
def test_an_error_in_a_context_names_it(tmp_path: Path, when: str, num_others: int) -> None:
    class Mine(Callback[Any]):
        def train_context(self) -> Any:
            if when == "call":
                raise ZeroDivisionError
            return self.context()

        @contextlib.contextmanager
        def context(self) -> Iterator[None]:
            if when == "enter":
                raise ZeroDivisionError
            yield
            raise ZeroDivisionError

    callbacks = [*(Around("other", []) for _ in range(num_others)), Mine()]
    with pytest.raises(ZeroDivisionError) as caught:
        TinyTrainer(tiny_config(tmp_path, callbacks)).fit()

    note = "raised in Mine.train_context on rank 0 at step 0 (epoch 0)"
    assert caught.value.__notes__.count(note) == 1


@pytest.mark.parametrize("fails_in", ["step", "inner context"])
def test_a_context_that_swallows_an_error_is_an_error_that_names_it(fails_in: str) -> None:
    class Swallows(Callback[Any]):
        def train_context(self) -> Any:
            return contextlib.suppress(ZeroDivisionError)

    class Inner(Callback[Any]):
        @contextlib.contextmanager
        def train_context(self) -> Iterator[None]:
            if fails_in == "inner context":
                raise ZeroDivisionError("planned")
            yield

    context = CallbackCollection([Swallows(), Inner()]).train_context
    assert context is not None
    with (
        pytest.raises(RuntimeError, match=r"Swallows\.train_context suppressed an error") as caught,
        context(),
    ):
        raise ZeroDivisionError("planned")

    assert repr(caught.value.__cause__) == "ZeroDivisionError('planned')"


class RaisesAgain(contextlib.AbstractContextManager[None]):
    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None:
            raise error


@pytest.mark.parametrize("context_of_b", [contextlib.nullcontext, RaisesAgain])
def test_an_error_of_the_step_is_not_attributed_to_a_context(context_of_b: Any) -> None:
    b = Around("b", [])
    b.train_context = context_of_b  # type: ignore[method-assign]
    context = CallbackCollection([Around("a", []), b]).train_context
    assert context is not None
    with pytest.raises(ZeroDivisionError) as caught, context():
        raise ZeroDivisionError

    assert not hasattr(caught.value, "__notes__")


# Notes


@pytest.mark.parametrize(
    "hook", [hook for hook in HOOKS if hook not in (*CONTEXTS, "on_exception", "post_fit")]
)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_error_names_the_callback_and_the_hook(tmp_path: Path, hook: str, position: int) -> None:
    recorders = [Recorder(fail_in=hook if n == position else None) for n in range(3)]
    with pytest.raises(ValueError, match="planned") as caught:
        TinyTrainer(tiny_config(tmp_path, recorders, num_sanity_val_steps=1)).fit()

    name = "Recorder" if position == 0 else f"Recorder_{position + 1}"
    assert caught.value.__notes__[0].startswith(f"raised in {name}.{hook} on rank 0 at step ")


def test_the_note_has_step_and_epoch(tmp_path: Path) -> None:
    class Fails(Callback[Any]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if self.trainer.global_step == 11:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        TinyTrainer(tiny_config(tmp_path, [Fails()], n_epochs=2)).fit()

    assert caught.value.__notes__ == [
        "raised in Fails.post_train_step on rank 0 at step 11 (epoch 1)"
    ]


def test_an_error_in_a_shared_function_names_the_right_callback() -> None:
    num_calls = 0

    def fails_the_second_time() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise ZeroDivisionError

    class Mine(Callback[Any]):
        pre_launch = staticmethod(fails_the_second_time)

    with pytest.raises(ZeroDivisionError) as caught:
        CallbackCollection([Mine(), Mine()]).pre_launch()

    assert caught.value.__notes__ == ["raised in Mine_2.pre_launch"]


def test_an_error_in_clean_up_gets_a_note(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="planned") as caught:
        TinyTrainer(tiny_config(tmp_path, [Recorder(fail_in="post_fit")], max_steps=2)).fit()

    assert caught.value.__notes__ == ["raised in Recorder.post_fit on rank 0 at step 2 (epoch 0)"]


# Rank-zero hooks mustn't call collectives


COLLECTIVES: dict[str, Callable[[Any], Any]] = {
    "world.all_reduce": lambda world: world.all_reduce(1.0),
    "world.all_gather": lambda world: world.all_gather(torch.ones(2)),
    "world.broadcast": lambda world: world.broadcast(torch.ones(2)),
    "world.broadcast_object": lambda world: world.broadcast_object("x"),
    "world.barrier": lambda world: world.barrier(),
    "world.agree": lambda world: world.agree(1),
    "world.any_rank": lambda world: world.any_rank(True),
    "world.all_ranks": lambda world: world.all_ranks(True),
    "world.each": lambda world: world.each(lambda: 1),
    "world.on_rank_zero": lambda world: world.on_rank_zero(lambda: 1),
    "world.group": lambda world: world.group("a new kind"),
}
TORCH_COLLECTIVES: dict[str, Callable[[Any], Any]] = {
    "all_reduce": lambda world: dist.all_reduce(torch.ones(2)),
    "all_reduce async": lambda world: dist.all_reduce(torch.ones(2), async_op=True),
    "all_gather_object": lambda world: dist.all_gather_object([None, None], 1),
    "broadcast_object_list": lambda world: dist.broadcast_object_list([1]),
    "barrier": lambda world: dist.barrier(),
    "send": lambda world: dist.send(torch.ones(2), 1),
    "full_tensor": lambda world: full_tensor(world),
}


def full_tensor(world: Any) -> Any:
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(
        torch.ones(2), world.get_mesh("dp_replicate"), [Shard(0)]
    ).full_tensor()


class Calls(RankZeroCallback[Any]):
    """Calls a collective in one hook, and records the error."""

    def __init__(self, hook: str, collective: str) -> None:
        self.collective = {**COLLECTIVES, **TORCH_COLLECTIVES}[collective]
        self.errors: list[str] = []

        def call(*args: Any) -> None:
            try:
                self.collective(self.trainer.world)
            except RuntimeError as error:
                self.errors.append(str(error))

        def context() -> Any:
            return contextlib.nullcontext(call()) if hook == "train_context" else Entered(call)

        setattr(self, hook, context if hook in CONTEXTS else call)


class Entered(contextlib.AbstractContextManager[None]):
    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __enter__(self) -> None:
        self.call()

    def __exit__(self, *error: object) -> None:
        self.call()


def refused_on_rank(root: str) -> list[list[str]]:
    """Errors of one callback per collective, each calling it in another hook, on two ranks."""
    hooks = [hook for hook in HOOKS if hook not in ("pre_launch", "on_exception")]
    names = [*COLLECTIVES, *TORCH_COLLECTIVES]
    callbacks = [Calls(hooks[n % len(hooks)], name) for n, name in enumerate(names)]
    config = tiny_config(root, callbacks)
    config.debug = True
    TinyTrainer(config).fit()
    return [callback.errors for callback in callbacks]


def test_in_debug_mode_collectives_of_a_rank_zero_hook_raise(tmp_path: Path) -> None:
    zero, one = run_on_ranks(refused_on_rank, 2, str(tmp_path))

    assert one == [[]] * len(zero)
    for errors in zero:
        assert errors
        assert all(
            "of a RankZeroCallback: the other ranks don't run this hook" in e for e in errors
        )


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != "on_exception"])
def test_in_debug_mode_every_hook_is_guarded_in_a_world_of_one(tmp_path: Path, hook: str) -> None:
    callback = Calls(hook, "world.all_reduce")
    config = tiny_config(tmp_path, [callback])
    config.debug = True
    TinyTrainer(config).fit()

    assert callback.errors
    assert f"all_reduce in Calls.{hook} of a RankZeroCallback" in callback.errors[0]


def test_a_guarded_context_does_not_guard_the_step(tmp_path: Path) -> None:
    class Reduces(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.world.all_reduce(1.0)
            return super().training_step(batch, batch_idx)

    class Wraps(RankZeroCallback[Any]):
        def train_context(self) -> Any:
            return contextlib.nullcontext()

    config = tiny_config(tmp_path, [Wraps()])
    config.debug = True
    Reduces(config).fit()


def test_state_methods_of_a_rank_zero_callback_are_guarded(tmp_path: Path) -> None:
    class Gathers(RankZeroCallback[Any]):
        def state_dict(self) -> dict[str, Any]:
            return {"all": self.trainer.world.all_gather(1)}

    config = tiny_config(tmp_path, [Gathers()])
    config.debug = True
    trainer = TinyTrainer(config)

    with pytest.raises(RuntimeError, match=r"all_gather in Gathers\.state_dict of a R"):
        trainer.callbacks.state_dict()


def fails_on_rank_zero(root: str) -> str:
    callback = Raises()
    config = tiny_config(root, [callback])
    config.debug = True
    try:
        TinyTrainer(config).fit()
    except RuntimeError as error:
        return "\n".join([str(error), *getattr(error, "__notes__", [])])
    return "no error"


class Raises(RankZeroCallback[Any]):
    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.trainer.world.all_reduce(result["loss"])


def test_the_refused_collective_ends_the_run_on_both_ranks(tmp_path: Path) -> None:
    start = datetime.datetime.now(tz=datetime.UTC)
    zero, one = run_on_ranks(fails_on_rank_zero, 2, str(tmp_path), timeout_s=30)

    assert "all_reduce in Raises.post_train_step of a RankZeroCallback" in zero
    assert "raised in Raises.post_train_step on rank 0 at step 1" in zero
    assert one != "no error"
    assert (datetime.datetime.now(tz=datetime.UTC) - start).total_seconds() < 10
