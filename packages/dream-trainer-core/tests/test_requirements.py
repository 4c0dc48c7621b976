"""Requirements of callbacks, in every form; a trainer that lacks one is refused first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
from typing_extensions import TypeVar as TypeVarWithDefault

from dream_trainer.callbacks import Callback, CallbackCollection, RankZeroCallback, intersection
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.trainer import AbstractTrainer, BaseTrainer, DreamTrainer
from dream_trainer.trainer.mixins import EvalMetricMixin, LoggerMixin, SetupMixin

U = TypeVar("U")


class A(AbstractTrainer): ...


class B(AbstractTrainer): ...


class C(AbstractTrainer): ...


class Boxed(BaseTrainer, Generic[U]): ...


@intersection
class Both(A, B): ...


@intersection
class All(Both, C): ...


class DerivedFromBoth(Both): ...


TrainerT = TypeVar("TrainerT", bound=A)
DefaultT = TypeVarWithDefault("DefaultT", bound=AbstractTrainer, default=B)
FreeT = TypeVar("FreeT", bound=AbstractTrainer)


class ForAnyA(Callback[TrainerT]): ...


class ForBUnlessSaid(Callback[DefaultT]): ...


class Swapped(Callback[FreeT], Generic[U, FreeT]): ...


class Later(Callback["DefinedLater"]): ...


class RankZeroLater(RankZeroCallback["DefinedLater"]): ...


class DefinedLater(A): ...


class NeedsNothing(Callback): ...  # type: ignore[type-arg]  # as users do


class NeedsAny(Callback[Any]): ...


class NeedsA(Callback[A]): ...


class NeedsAAndB(Callback[A & B]): ...  # type: ignore[operator,valid-type]  # see typing_tests


class NeedsABAndC(Callback[A & B & C]): ...  # type: ignore[operator,valid-type]


class NeedsNested(Callback[A & (B & C)]): ...  # type: ignore[operator,valid-type]


class NeedsBoth(Callback[Both]): ...


class NeedsAll(Callback[All]): ...


class NeedsBothAndC(Callback[Both & C]): ...  # type: ignore[operator,valid-type]


class NeedsDerived(Callback[DerivedFromBoth]): ...


class NeedsBoxed(Callback[Boxed[int]]): ...


class RankZeroNeedsA(RankZeroCallback[A]): ...


class InheritsNeedsA(NeedsA): ...


class InheritsAndAdds(NeedsA, Callback[B]): ...  # type: ignore[misc]


@pytest.mark.parametrize(
    ("callback", "requirements"),
    [
        (NeedsNothing, (AbstractTrainer,)),
        (NeedsAny, ()),
        (NeedsA, (A,)),
        (NeedsAAndB, (A, B)),
        (NeedsABAndC, (A, B, C)),
        (NeedsNested, (A, B, C)),
        (NeedsBoth, (A, B)),
        (NeedsAll, (A, B, C)),
        (NeedsBothAndC, (A, B, C)),
        (NeedsDerived, (DerivedFromBoth,)),
        (NeedsBoxed, (Boxed,)),
        (RankZeroNeedsA, (A,)),
        (InheritsNeedsA, (A,)),
        (InheritsAndAdds, (A, B)),
        (ForAnyA, (A,)),
        (type("Bare", (ForAnyA,), {}), (A,)),
        (ForBUnlessSaid, (B,)),
        (Later, (DefinedLater,)),
        (RankZeroLater, (DefinedLater,)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_requirements_in_every_form(callback: Any, requirements: tuple[type, ...]) -> None:
    assert callback.requirements() == requirements


def test_parameters_are_followed_through_generic_bases() -> None:
    class Middle(ForAnyA[TrainerT]): ...

    class End(Middle[DerivedFromBoth]): ...

    class Said(ForBUnlessSaid[A]): ...

    class Second(Swapped[int, B]): ...

    assert End.requirements() == (DerivedFromBoth,)
    assert Said.requirements() == (A,)
    assert Second.requirements() == (B,)


def test_a_name_imported_for_type_checkers_is_not_checked() -> None:
    class Mine(Callback["OnlyForTypeCheckers"]): ...  # type: ignore[name-defined]

    assert Mine.requirements() == ()


# Attaching


class WithA(TinyTrainer, A): ...


class WithAll(TinyTrainer, A, B, C): ...


CALLBACKS = (NeedsA, NeedsAAndB, NeedsABAndC, NeedsBoth, NeedsAll, NeedsNothing, NeedsAny)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_trainer_derived_from_the_mixins_is_accepted(tmp_path: Path, callback: Any) -> None:
    WithAll(tiny_config(tmp_path, [callback()]))


@pytest.mark.parametrize(
    ("callback", "missing"),
    [
        (NeedsAAndB, "B"),
        (NeedsABAndC, "B, C"),
        (NeedsBoth, "B"),
        (NeedsAll, "B, C"),
        (NeedsBoxed, "Boxed"),
    ],
)
def test_a_missing_mixin_is_an_error_with_callback_and_mixins(
    tmp_path: Path, callback: Any, missing: str
) -> None:
    with pytest.raises(TypeError) as caught:
        WithA(tiny_config(tmp_path, CallbackCollection({"mine": callback()})))

    assert str(caught.value) == (
        f"callback mine needs a trainer with {missing}, and WithA isn't one; "
        f"derive WithA from {missing}, or leave the callback out"
    )


def test_nothing_is_attached_if_one_callback_is_refused(tmp_path: Path) -> None:
    fine = NeedsA()
    with pytest.raises(TypeError, match="NeedsBoth needs a trainer with B"):
        WithA(tiny_config(tmp_path, [fine, NeedsBoth()]))

    assert not hasattr(fine, "trainer")


def test_a_refusal_comes_before_any_hook_and_before_anything_is_written(tmp_path: Path) -> None:
    class Writes(Callback[Any]):
        def pre_launch(self) -> None:
            self.trainer.run_dir.mkdir(parents=True)

    with pytest.raises(TypeError, match="needs a trainer with B"):
        WithA(tiny_config(tmp_path, [Writes(), NeedsBoth()])).fit()

    assert list(tmp_path.iterdir()) == []


def refused_on_rank(root: str) -> tuple[str, bool]:
    import torch.distributed

    try:
        WithA(tiny_config(root, [NeedsAAndB()])).fit()
    except TypeError as error:
        return str(error), torch.distributed.is_initialized()
    return "accepted", True


def test_a_refusal_comes_before_anything_is_launched(tmp_path: Path) -> None:
    for message, is_launched in run_on_ranks(refused_on_rank, 2, str(tmp_path)):
        assert "needs a trainer with B" in message
        assert not is_launched


def test_a_trainer_of_few_mixins_accepts_callbacks_that_need_no_others(tmp_path: Path) -> None:
    class Small(BaseTrainer, SetupMixin):
        configure_models = TinyTrainer.configure_models
        configure_optimizers = TinyTrainer.configure_optimizers
        configure_dataloaders = TinyTrainer.configure_dataloaders
        _loader = TinyTrainer._loader  # noqa: SLF001  # all of TinyTrainer but its mixins
        training_step = TinyTrainer.training_step
        validation_step = TinyTrainer.validation_step

    class NeedsMetrics(Callback[EvalMetricMixin & LoggerMixin]): ...  # type: ignore[operator,valid-type]

    class NeedsLoop(Callback[BaseTrainer]):
        def post_fit(self) -> None:
            self.steps = self.trainer.global_step

    class NeedsDream(Callback[DreamTrainer]): ...

    callback = NeedsLoop()
    Small(tiny_config(tmp_path, [callback])).fit()

    assert callback.steps == 8
    with pytest.raises(TypeError, match="needs a trainer with EvalMetricMixin, LoggerMixin"):
        Small(tiny_config(tmp_path, [NeedsMetrics()]))
    with pytest.raises(TypeError, match="needs a trainer with DreamTrainer"):
        Small(tiny_config(tmp_path, [NeedsDream()]))
