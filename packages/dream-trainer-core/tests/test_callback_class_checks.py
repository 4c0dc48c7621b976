"""A callback class that can't work is refused when it is defined."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import Recorder

from dream_trainer.callbacks import Callback
from dream_trainer.callbacks.callback import HOOKS
from dream_trainer.callbacks.foreign_hooks import FOREIGN_HOOKS
from dream_trainer.testing import TinyTrainer, tiny_config

# Misspelt hooks


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("post_train_stp", "post_train_step"),
        ("pre_validaton_epoch", "pre_validation_epoch"),
        ("train_contxt", "train_context"),
        ("on_exeption", "on_exception"),
        ("training_context", "train_context"),
        ("val_context", "validation_context"),
        ("prefit", "pre_fit"),
        ("pots_fit", "post_fit"),
        ("load_statedict", "load_state_dict"),
        ("state_dicts", "state_dict"),
        ("on_train_epoch_end", "post_train_epoch"),
        ("on_step_end", "post_train_step"),
        ("validation_epoch_end", "post_validation_epoch"),
        ("on_save_checkpoint", "state_dict"),
    ],
)
def test_a_misspelt_hook_is_refused_with_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=f"Mine.{name} is not a hook.*did you mean {nearest}?"):
        type("Mine", (Callback,), {name: lambda self: None})


@pytest.mark.parametrize("wrap", [staticmethod, classmethod, torch.no_grad()])
def test_a_misspelt_hook_is_refused_however_it_is_decorated(wrap: Any) -> None:
    with pytest.raises(TypeError, match="did you mean post_fit"):
        type("Mine", (Callback,), {"post_fitt": wrap(lambda *_: None)})


def test_a_misspelt_hook_of_a_mixin_is_refused_too() -> None:
    class Timing:
        def post_train_stp(self, result: Any, batch_idx: int) -> None: ...

    with pytest.raises(TypeError, match=r"Timing\.post_train_stp is not a hook"):

        class Mine(Timing, Callback[Any]): ...


def test_other_methods_are_allowed_unless_they_look_like_hooks() -> None:
    class Mine(Callback[Any]):
        before_all = "data"

        def _post_process(self) -> None: ...

        def compute(self) -> None: ...

        def state(self) -> None: ...

        @property
        def on_gpu(self) -> bool:
            return False

    class Derived(Mine):
        def compute(self) -> None: ...

    assert Derived.requirements() == ()


@pytest.mark.parametrize(
    "name",
    ["ema_state_dict", "get_state_dict", "train_step", "validation_step", "reconfigure", "refit"],
)
def test_a_name_that_only_resembles_a_hook_is_allowed(name: str) -> None:
    assert type("Mine", (Callback,), {name: lambda self: None})


def test_lightnings_setup_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Mine.setup is a hook of Lightning.*write post_setup"):

        class Mine(Callback[Any]):
            def setup(self, trainer: Any, pl_module: Any, stage: str) -> None: ...

    class Fine(Callback[Any]):
        def setup(self, path: Path) -> None: ...


@pytest.mark.parametrize("foreign", FOREIGN_HOOKS)
def test_foreign_hooks_lead_to_hooks_here(foreign: str) -> None:
    assert foreign not in HOOKS
    assert FOREIGN_HOOKS[foreign] in (*HOOKS, "state_dict", "load_state_dict")


def test_methods_of_a_foreign_base_are_allowed() -> None:
    class Client:
        def on_message(self) -> None: ...

    class Mine(Client, Callback[Any]):
        def on_message(self) -> None: ...

    assert "on_message" not in HOOKS and Mine()


# Signatures


def define(name: str, function: Any) -> Any:
    return type("Mine", (Callback,), {name: function})


@pytest.mark.parametrize(
    ("name", "function", "found"),
    [
        ("post_train_step", lambda self: None, "(self)"),
        ("post_train_step", lambda self, result: None, "(self, result)"),
        (
            "post_train_step",
            lambda self, result, batch_idx, e: None,
            "(self, result, batch_idx, e)",
        ),
        (
            "post_train_step",
            lambda self, result, *, batch_idx: None,
            "(self, result, *, batch_idx)",
        ),
        ("pre_fit", lambda self, trainer: None, "(self, trainer)"),
        ("pre_fit", lambda: None, "()"),
        ("pre_fit", staticmethod(lambda self: None), "(self)"),
        ("train_context", lambda self, batch: None, "(self, batch)"),
        ("on_exception", lambda self: None, "(self)"),
        ("state_dict", lambda self, prefix: None, "(self, prefix)"),
        ("load_state_dict", lambda self: None, "(self)"),
        (
            "load_state_dict",
            lambda self, state_dict, trainer, x: None,
            "(self, state_dict, trainer, x)",
        ),
    ],
)
def test_a_signature_that_cannot_take_the_arguments_is_refused(
    name: str, function: Any, found: str
) -> None:
    arguments = {**HOOKS, "state_dict": (), "load_state_dict": ("state_dict", "trainer")}[name]
    with pytest.raises(TypeError) as caught:
        define(name, function)

    assert str(caught.value) == (
        f"Mine.{name}{found} can't take the hook's arguments; "
        f"write def {name}({', '.join(('self', *arguments))})"
    )


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("post_train_step", lambda self, batch_idx, result: None),
        ("pre_train_step", lambda self, batch_idx, batch: None),
        ("pre_optimizer_step", lambda self, optimizer, model: None),
        ("post_validation_step", lambda self, batch_idx, outputs: None),
        ("load_state_dict", lambda self, trainer, state_dict: None),
    ],
)
def test_swapped_arguments_are_refused(name: str, function: Any) -> None:
    with pytest.raises(TypeError, match="can't take the hook's arguments"):
        define(name, function)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("post_train_step", lambda self, outputs, i: None),
        ("post_train_step", lambda self, result, batch: None),
        ("post_train_step", lambda self, *args: None),
        ("post_train_step", lambda self, *args, **kwargs: None),
        ("post_train_step", lambda self, result, batch_idx, extra=None: None),
        ("post_train_step", staticmethod(lambda result, batch_idx: None)),
        ("post_train_step", classmethod(lambda cls, result, batch_idx: None)),
        ("post_train_step", functools.partialmethod(lambda self, k, result, batch_idx: None, 1)),
        ("load_state_dict", lambda self, state_dict: None),
        ("load_state_dict", lambda self, state_dict, strict=True: None),
        ("load_state_dict", lambda self, state_dict, trainer: None),
        ("pre_fit", torch.no_grad()(lambda self: None)),
        ("train_context", contextlib.contextmanager(lambda self: iter([None]))),
    ],
)
def test_any_signature_that_can_take_the_arguments_is_accepted(name: str, function: Any) -> None:
    define(name, function)


def test_a_callable_object_can_be_a_hook(tmp_path: Path) -> None:
    class Counts:
        calls = 0

        def __call__(self, result: Any, batch_idx: int) -> None:
            self.calls += 1

    counts = Counts()
    TinyTrainer(tiny_config(tmp_path, [define("post_train_step", counts)()], max_steps=3)).fit()

    assert counts.calls == 3


async def coroutine(self: Any) -> None: ...


async def async_generator(self: Any) -> Any:
    yield


def generator(self: Any) -> Iterator[None]:
    yield


@pytest.mark.parametrize("function", [coroutine, async_generator])
def test_a_coroutine_is_refused(function: Any) -> None:
    with pytest.raises(
        TypeError, match=r"Mine\.pre_fit is a coroutine, which would never be awaited"
    ):
        define("pre_fit", function)


@pytest.mark.parametrize(
    ("hook", "hint"), [("pre_fit", "leave out the yield"), ("train_context", "@contextlib")]
)
def test_a_generator_is_refused(hook: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"Mine.{hook} is a generator.*{hint}"):
        define(hook, generator)


@pytest.mark.parametrize("value", [None, 3, property(lambda self: None)])
def test_a_hook_that_is_not_a_method_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"Mine\.pre_fit is a \w+, not a method; write def pre_fit"):
        define("pre_fit", value)


def test_signatures_of_a_mixins_hooks_are_checked() -> None:
    class Timing:
        def post_train_step(self) -> None: ...

    with pytest.raises(TypeError, match=r"Mine\.post_train_step\(self\) can't take"):

        class Mine(Timing, Callback[Any]): ...


def test_a_hook_hidden_behind_callback_is_refused() -> None:
    class Timing:
        def post_fit(self) -> None: ...

    with pytest.raises(TypeError, match=r"Timing\.post_fit would never be called.*list Timing fir"):

        class Mine(Callback[Any], Timing): ...  # type: ignore[misc]  # that is the mistake


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("ProgressBar", "is 'ProgressBar'; a set"),
        (Recorder, "is <class.*; a set"),
        ({3}, "holds 3"),
    ],
    ids=["string", "class", "number"],
)
@pytest.mark.parametrize("name", ["before", "after"])
def test_invalid_constraints_are_refused(name: str, value: Any, found: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine\.{name} {found}"):
        define(name, value)
