from __future__ import annotations

import textwrap

import pytest

from tools.check_layout import breaks_a_rule, imports_of, layer_of

CORE = {"dream_trainer.trainer", "dream_trainer.trainer.loop", "dream_trainer.callbacks"}


def test_imports_are_found_at_any_depth_but_not_under_type_checking() -> None:
    source = textwrap.dedent("""
        import torch.nn
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from dream_callbacks.fsdp import OptimizeFSDP
        else:
            import json
        def function():
            from dream_trainer.trainer import loop
    """)

    assert {found.target for found in imports_of(source)} == {
        "torch.nn",
        "typing.TYPE_CHECKING",
        "json",
        "dream_trainer.trainer.loop",
    }


@pytest.mark.parametrize(
    ("module", "target", "reason"),
    [
        ("dream_trainer.callbacks", "dream_callbacks.fsdp.OptimizeFSDP", "no callback package"),
        ("dream_trainer.world.mesh", "dream_trainer.trainer.loop", "stands above it"),
        ("dream_trainer.callbacks.order", "dream_trainer.trainer.BaseTrainer", "stands above it"),
        ("dream_callbacks.fsdp.trace", "dream_callbacks.profile.trace_files", "imports no other"),
        ("dream_callbacks.fsdp.trace", "dream_trainer.callbacks._aliases.resolve", "public names"),
        ("dream_callbacks.fsdp.trace", "dream_trainer.world._launch", "public names"),
    ],
)
def test_an_import_against_the_arrows_is_refused(module: str, target: str, reason: str) -> None:
    assert reason in (breaks_a_rule(module, target, CORE) or "")


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("dream_trainer.trainer.base", "dream_trainer.trainer.loop"),
        ("dream_trainer.trainer.loop", "dream_trainer.callbacks.Callback"),
        ("dream_trainer.testing.trainers", "dream_trainer.trainer.dream.DreamTrainer"),
        ("dream_callbacks.fsdp.callback", "dream_callbacks.fsdp.trace.order"),
        ("dream_callbacks.fsdp.callback", "dream_trainer.callbacks.Callback"),
        ("dream_callbacks.logging.sinks.wandb", "wandb.sdk"),
    ],
)
def test_an_import_along_the_arrows_is_allowed(module: str, target: str) -> None:
    assert breaks_a_rule(module, target, CORE) is None


def test_a_module_belongs_to_the_layer_with_the_longest_name() -> None:
    assert layer_of("dream_trainer.interface.trainer") < layer_of("dream_trainer.callbacks.order")  # type: ignore[operator]
    assert layer_of("dream_trainer.callbacks.order") < layer_of("dream_trainer.trainer.loop")  # type: ignore[operator]
    assert layer_of("torch.nn") is None
