"""The loop: order of hooks, limits, validation, stopping, failures, equality with PyTorch."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import Recorder
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dream_trainer.callbacks import Callback, Every
from dream_trainer.callbacks.callback import CONTEXTS, HOOKS
from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.testing.trainers import TinyModel
from dream_trainer.trainer import BaseTrainer

SETUP = ["pre_launch", "pre_configure", "post_configure", "pre_setup", "post_setup"]
OPTIMIZER = [
    "pre_optimizer_step",
    "post_optimizer_step",
    "pre_optimizer_zero_grad",
    "post_optimizer_zero_grad",
]
MICROBATCH = ["pre_train_step", "enter train_context", "exit train_context", "post_train_step"]
STEP = [
    "pre_train_step",
    "enter train_context",
    *OPTIMIZER,
    "exit train_context",
    "post_train_step",
]
VALIDATION_BATCH = [
    "pre_validation_step",
    "enter validation_context",
    "exit validation_context",
    "post_validation_step",
]


def validation(num_batches: int) -> list[str]:
    return ["pre_validation_epoch", *VALIDATION_BATCH * num_batches, "post_validation_epoch"]


def recorded(tmp_path: Path, **training: Any) -> list[str]:
    recorder = Recorder()
    TinyTrainer(tiny_config(tmp_path, [recorder], **training)).fit()
    return recorder.events


def test_hooks_of_one_epoch_come_in_the_documented_order(tmp_path: Path) -> None:
    assert recorded(tmp_path, n_epochs=1, train_steps_per_epoch=2) == [
        *SETUP,
        "pre_fit",
        "pre_epoch",
        "pre_train_epoch",
        *STEP * 2,
        "post_train_epoch",
        *validation(2),
        "post_epoch",
        "post_fit",
    ]


def test_two_epochs_with_validation_every_three_steps(tmp_path: Path) -> None:
    events = recorded(tmp_path, n_epochs=2, train_steps_per_epoch=4, val_every_n_steps=3)

    epoch = ["pre_epoch", "pre_train_epoch"]
    assert events[len(SETUP) :] == [
        "pre_fit",
        *epoch,
        *STEP * 3,
        *validation(2),
        *STEP,
        "post_train_epoch",
        "post_epoch",
        *epoch,
        *STEP * 2,
        *validation(2),
        *STEP * 2,
        "post_train_epoch",
        "post_epoch",
        "post_fit",
    ]


def test_accumulation_steps_with_each_third_batch_and_with_the_remainder(tmp_path: Path) -> None:
    events = recorded(tmp_path, n_epochs=1, gradient_accumulation_steps=3, val_steps_per_epoch=0)

    group = [*MICROBATCH * 2, *STEP]  # 8 batches: 3 + 3 + 2
    assert events[len(SETUP) :] == [
        "pre_fit",
        "pre_epoch",
        "pre_train_epoch",
        *group * 2,
        *MICROBATCH,
        *STEP,
        "post_train_epoch",
        "post_epoch",
        "post_fit",
    ]


def test_sanity_validation_comes_before_the_first_epoch_and_leaves_no_trace(
    tmp_path: Path,
) -> None:
    events = recorded(
        tmp_path, n_epochs=1, train_steps_per_epoch=1, num_sanity_val_steps=1, val_steps_per_epoch=2
    )
    assert events[len(SETUP) :][: len(VALIDATION_BATCH) + 2] == [
        "pre_fit",
        *VALIDATION_BATCH,
        "pre_epoch",
    ]

    with_sanity, without = (
        weights_after(tmp_path, num_sanity_val_steps=n, n_epochs=1) for n in (2, 0)
    )
    assert all(torch.equal(with_sanity[name], without[name]) for name in without)


def weights_after(tmp_path: Path, **training: Any) -> dict[str, torch.Tensor]:
    class DrawsInValidation(DropoutTrainer):
        def configure_dataloaders(self) -> Any:
            return shuffled_loader(), shuffled_loader()

    trainer = DrawsInValidation(tiny_config(tmp_path, **training))
    trainer.fit()
    return trainer.model.state_dict()


def test_counters_are_exact_in_each_hook(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    class Counting(Callback[TinyTrainer]):
        def note(self, hook: str) -> None:
            seen.append((hook, self.trainer.global_step, self.trainer.local_batches))
            counters = self.trainer.state_dict()["trainer"]["counters"]
            assert (counters["global_step"], counters["local_batches"]) == seen[-1][1:]

        def pre_train_step(self, batch: Any, batch_idx: int) -> None:
            self.note(f"pre {batch_idx}")

        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            self.note(f"post {batch_idx}")

        def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
            self.note("validation")

    training = {"gradient_accumulation_steps": 2, "val_every_n_steps": 1, "val_steps_per_epoch": 1}
    TinyTrainer(tiny_config(tmp_path, [Counting()], train_steps_per_epoch=2, **training)).fit()

    assert seen == [
        ("pre 0", 0, 0),
        ("post 0", 0, 1),
        ("pre 1", 0, 1),
        ("post 1", 1, 2),
        ("validation", 1, 2),
        ("pre 2", 1, 2),
        ("post 2", 1, 3),
        ("pre 3", 1, 3),
        ("post 3", 2, 4),
        ("validation", 2, 4),
    ]


def test_results_are_detached(tmp_path: Path) -> None:
    recorder = Recorder()
    TinyTrainer(tiny_config(tmp_path, [recorder], train_steps_per_epoch=1)).fit()

    (result, batch_idx) = recorder.arguments["post_train_step"][0]
    assert set(result) == {"loss"}
    assert batch_idx == 0
    assert not result["loss"].requires_grad


# Equality with PyTorch


def plain_pytorch_losses(num_epochs: int, accumulation: int, clip: float | None) -> list[float]:
    """A hand-written loop for TinyTrainer's task."""
    torch.manual_seed(42)
    random.seed(42)
    model = TinyModel(width=8, num_blocks=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5)
    loader = shuffled_loader()
    losses = []
    for _ in range(num_epochs):
        batches = list(loader)
        for start in range(0, len(batches), accumulation):
            group = batches[start : start + accumulation]
            for x, y in group:
                loss = nn.functional.mse_loss(nn.functional.dropout(model(x), 0.1), y)
                (loss / len(group)).backward()
                losses.append(loss.item())
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return losses


def shuffled_loader() -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 4, generator=generator)
    data = torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True))
    return DataLoader(data, batch_size=4, shuffle=True)


class LossKeeper(Callback[TinyTrainer]):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.losses.append(result["loss"].item())


class DropoutTrainer(TinyTrainer):
    def configure_schedulers(self) -> None:
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=5)

    def configure_dataloaders(self) -> Any:
        return shuffled_loader()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        loss = nn.functional.mse_loss(nn.functional.dropout(self.model(x), 0.1), y)
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        return {"loss": loss}


@pytest.mark.parametrize("accumulation", [1, 2], ids=["no_accumulation", "accumulation_2"])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["no_clip", "clip"])
def test_losses_equal_those_of_a_plain_pytorch_loop_bit_for_bit(
    tmp_path: Path, accumulation: int, clip: float | None
) -> None:
    keeper = LossKeeper()
    config = tiny_config(
        tmp_path,
        [keeper],
        n_epochs=3,
        gradient_accumulation_steps=accumulation,
        gradient_clip_val=clip,
    )
    DropoutTrainer(config).fit()

    assert keeper.losses == plain_pytorch_losses(3, accumulation, clip)


# Limits and stopping


@pytest.mark.parametrize(
    ("training", "steps", "epochs_ended"),
    [
        ({"n_epochs": 3}, 24, 3),
        ({"max_steps": 5}, 5, 0),
        ({"max_steps": 20}, 20, 2),
        ({"n_epochs": 2, "max_steps": 100}, 16, 2),
        ({"n_epochs": 0}, 0, 0),
        ({"n_epochs": 2, "train_steps_per_epoch": 3}, 6, 2),
        ({}, 8, 1),
    ],
)
def test_training_ends_at_the_first_limit(
    tmp_path: Path, training: dict[str, Any], steps: int, epochs_ended: int
) -> None:
    recorder = Recorder()
    trainer = TinyTrainer(tiny_config(tmp_path, [recorder], **training))
    trainer.fit()

    assert trainer.global_step == steps
    assert recorder.events.count("post_epoch") == epochs_ended


def test_max_steps_in_mid_epoch_ends_with_a_validation(tmp_path: Path) -> None:
    recorder = Recorder()
    TinyTrainer(tiny_config(tmp_path, [recorder], max_steps=3)).fit()

    assert recorder.events[-2:] == ["post_validation_epoch", "post_fit"]


def test_max_time_stops_after_the_current_step(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path, max_time=1e-9))
    trainer.fit()

    assert trainer.global_step <= 1
    assert trainer.stop_reason is not None
    assert "max_time" in trainer.stop_reason


def test_stop_ends_after_the_current_step_and_fit_continues(tmp_path: Path) -> None:
    class StopsAt(Callback[TinyTrainer]):
        def __init__(self, step: int) -> None:
            self.step = step

        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if self.trainer.global_step == self.step:
                self.trainer.stop("enough")

    recorder, keeper = Recorder(), LossKeeper()
    trainer = TinyTrainer(tiny_config(tmp_path, [StopsAt(3), recorder, keeper], n_epochs=2))
    trainer.fit()
    assert (trainer.global_step, trainer.stop_reason) == (3, "enough")
    assert recorder.events[-2:] == ["post_train_step", "post_fit"]

    trainer.fit()
    assert (trainer.global_step, trainer.stop_reason) == (16, None)
    straight = LossKeeper()
    TinyTrainer(tiny_config(tmp_path, [straight], n_epochs=2)).fit()
    assert keeper.losses == straight.losses


def test_stop_in_validation_ends_the_epoch(tmp_path: Path) -> None:
    class Stops(Callback[TinyTrainer]):
        def post_validation_epoch(self, result: dict[str, Any]) -> None:
            self.trainer.stop("good enough")

    trainer = TinyTrainer(tiny_config(tmp_path, [Stops()], n_epochs=5))
    trainer.fit()

    assert trainer.global_step == 8
    assert trainer.stop_reason == "good enough"


def test_a_second_fit_continues_with_a_raised_limit(tmp_path: Path) -> None:
    keeper = LossKeeper()
    trainer = TinyTrainer(tiny_config(tmp_path, [keeper], n_epochs=1))
    trainer.fit()
    trainer.training_parameters.n_epochs = 2
    trainer.fit()

    straight = LossKeeper()
    TinyTrainer(tiny_config(tmp_path, [straight], n_epochs=2)).fit()
    assert keeper.losses == straight.losses


def test_a_fit_with_nothing_left_logs_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path, n_epochs=1))
    trainer.fit()
    with caplog.at_level(logging.WARNING):
        trainer.fit()

    assert "nothing is left to train: 1 epochs and 8 steps are done" in caplog.text


def test_fit_inside_fit_is_refused(tmp_path: Path) -> None:
    class Fits(Callback[TinyTrainer]):
        def pre_epoch(self) -> None:
            self.trainer.fit()

    with pytest.raises(RuntimeError, match=r"fit\(\) is running already"):
        TinyTrainer(tiny_config(tmp_path, [Fits()])).fit()


# Validation


def test_validation_runs_in_eval_mode_without_gradients_and_restores_each_modules_mode(
    tmp_path: Path,
) -> None:
    modes = []

    class Frozen(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.model.head.eval()

        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            modes.append((self.model.training, torch.is_grad_enabled()))
            return super().validation_step(batch, batch_idx)

    trainer = Frozen(tiny_config(tmp_path))
    trainer.fit()

    assert set(modes) == {(False, False)}
    assert trainer.model.training
    assert not trainer.model.head.training


def test_a_model_left_in_eval_mode_is_put_into_train_mode(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path, n_epochs=1))
    trainer.fit()
    trainer.model.eval()
    trainer.training_parameters.n_epochs = 2
    trainer.fit()

    assert trainer.model.training


def test_val_loss_is_the_mean_over_samples_whatever_the_batch_sizes(tmp_path: Path) -> None:
    class Uneven(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            train, _ = super().configure_dataloaders()
            self.val_data = [(torch.randn(n, 4), torch.randn(n, 1)) for n in (1, 7, 2)]
            return train, self.val_data

    recorder = Recorder()
    trainer = Uneven(tiny_config(tmp_path, [recorder]))
    trainer.fit()

    ((result,),) = recorder.arguments["post_validation_epoch"]
    x, y = (torch.cat(part) for part in zip(*trainer.val_data, strict=True))
    with torch.no_grad():
        expected = nn.functional.mse_loss(trainer.model(x), y).item()
    assert result == {"val_loss": pytest.approx(expected, rel=1e-6)}


def test_the_loss_of_an_epoch_is_the_mean_over_its_samples_alone(tmp_path: Path) -> None:
    class Uneven(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return [(torch.randn(n, 4), torch.randn(n, 1)) for n in (1, 7, 2)]

    recorder, keeper = Recorder(), LossKeeper()
    Uneven(tiny_config(tmp_path, [recorder, keeper], n_epochs=2)).fit()

    means = [result["loss"] for (result,) in recorder.arguments["post_train_epoch"]]
    weights = torch.tensor([0.1, 0.7, 0.2])
    losses = torch.tensor(keeper.losses).reshape(2, 3)
    assert means == pytest.approx((losses @ weights).tolist(), rel=1e-6)


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_custom_batch_types_are_moved_by_move_batch(tmp_path: Path, step: str) -> None:
    moved, used = [], []

    def use(self: Any, batch: Any, batch_idx: int) -> Any:
        used.append(batch)
        return getattr(TinyTrainer, step)(self, batch, batch_idx)

    class Moves(TinyTrainer):
        def move_batch(self, batch: Any) -> Any:
            moved.append(tuple(batch))
            return moved[-1]

    setattr(Moves, step, use)
    Moves(tiny_config(tmp_path, train_steps_per_epoch=2, val_steps_per_epoch=2)).fit()

    half = slice(0, 2) if step == "training_step" else slice(2, 4)
    assert [id(batch) for batch in used] == [id(batch) for batch in moved[half]]


def test_a_validation_due_in_the_saved_state_is_run(tmp_path: Path) -> None:
    states = []

    class Saves(Callback[TinyTrainer]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if self.trainer.global_step == 4:
                states.append(self.trainer.state_dict())

    training = {"max_steps": 4, "val_every_n_steps": 2}
    recorder = Recorder()
    TinyTrainer(tiny_config(tmp_path, [Saves(), recorder], **training)).fit()
    assert recorder.events.count("post_validation_epoch") == 2

    resumed = Recorder()
    trainer = TinyTrainer(tiny_config(tmp_path, [resumed], **training))
    trainer.setup()
    trainer.load_state_dict(states[0])
    trainer.fit()
    assert (
        resumed.arguments["post_validation_epoch"]
        == recorder.arguments["post_validation_epoch"][-1:]
    )
    assert "post_train_step" not in resumed.events


def test_a_validation_step_may_return_nothing(tmp_path: Path) -> None:
    class Silent(TinyTrainer):
        def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            return None

    recorder = Recorder()
    Silent(tiny_config(tmp_path, [recorder])).fit()

    assert recorder.arguments["post_validation_epoch"] == [({},)]


# Failures


@pytest.mark.parametrize(
    "hook",
    [
        f"enter {hook}" if hook in CONTEXTS else hook
        for hook in HOOKS
        if hook not in ("on_exception", "post_fit")
    ],
)
def test_after_an_error_all_clean_up_runs_and_the_first_error_is_raised(
    tmp_path: Path, hook: str
) -> None:
    class FailsInCleanUp(Callback[Any]):
        def on_exception(self, exception: BaseException) -> None:
            raise KeyError("second")

        def post_fit(self) -> None:
            raise KeyError("third")

    before, failing, after = Recorder(), Recorder(fail_in=hook), Recorder()
    trainer = TinyTrainer(tiny_config(tmp_path, [before, FailsInCleanUp(), failing, after]))

    with pytest.raises(ValueError, match="planned") as caught:
        trainer.fit()

    notes = "\n".join(caught.value.__notes__)
    assert f"raised in Recorder_2.{hook.removeprefix('enter ')} on rank 0 at step" in notes
    assert trainer.exception is caught.value
    for recorder in (before, failing, after):
        assert recorder.arguments["on_exception"] == [(caught.value,)]
    first_began, last_began = hook not in SETUP, hook not in (*SETUP, "pre_fit")
    for recorder, began in ((before, first_began), (after, last_began)):
        clean_up = ["on_exception", "post_fit"] if began else ["on_exception"]
        assert recorder.events[-len(clean_up) :] == clean_up
        assert recorder.events.count("post_fit") == began


@pytest.mark.parametrize(
    ("step", "at_step"), [("training_step", 1), ("validation_step", 8)], ids=["train", "validate"]
)
def test_an_error_in_a_step_has_a_note(tmp_path: Path, step: str, at_step: int) -> None:
    def fails(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise ZeroDivisionError("in the user's code")
        return getattr(TinyTrainer, step)(self, batch, batch_idx)

    trainer_class: Any = type("Fails", (TinyTrainer,), {step: fails})
    with pytest.raises(ZeroDivisionError) as caught:
        trainer_class(tiny_config(tmp_path)).fit()

    assert caught.value.__notes__ == [
        f"raised in {step} on rank 0 at step {at_step} (epoch 0, batch 1)"
    ]


def test_fit_continues_after_an_error_and_may_fail_again(tmp_path: Path) -> None:
    first, second, other = Recorder(fail_in="post_train_step"), Recorder(), Recorder()
    trainer = TinyTrainer(tiny_config(tmp_path, [first, second, other]))
    with pytest.raises(ValueError, match="planned"):
        trainer.fit()
    second.fail_in = "post_epoch"
    with pytest.raises(ValueError, match="planned"):
        trainer.fit()
    assert other.events[-2:] == ["on_exception", "post_fit"]
    assert other.events.count("post_fit") == 2

    trainer.training_parameters.n_epochs = 2
    trainer.fit()
    assert trainer.exception is None
    assert trainer.global_step == 16


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["ctrl_c", "exit"])
def test_ctrl_c_and_exit_clean_up_too(tmp_path: Path, error: BaseException) -> None:
    failing, other = Recorder(fail_in="post_train_step", error=error), Recorder()
    with pytest.raises(type(error)):
        TinyTrainer(tiny_config(tmp_path, [failing, other])).fit()

    assert other.events[-2:] == ["on_exception", "post_fit"]


def test_an_error_in_post_fit_is_raised_after_the_others_cleaned_up(tmp_path: Path) -> None:
    failing, other = Recorder(fail_in="post_fit"), Recorder()
    with pytest.raises(ValueError, match="planned"):
        TinyTrainer(tiny_config(tmp_path, [failing, other])).fit()

    assert other.events.count("post_fit") == 1


def test_a_context_that_swallows_errors_is_an_error(tmp_path: Path) -> None:
    import contextlib

    class Swallows(Callback[Any]):
        def train_context(self) -> Any:
            return contextlib.suppress(ZeroDivisionError)

    class Fails(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="suppressed an error of training_step"):
        Fails(tiny_config(tmp_path, [Swallows()])).fit()


# Invalid input


def test_a_training_step_that_returns_nothing_useful_is_refused(tmp_path: Path) -> None:
    class Returns(TinyTrainer):
        value: Any = None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.value

    for value, found in ((None, "None"), (3.0, "a float"), ([1], "a list")):
        Returns.value = value
        with pytest.raises(TypeError, match=f"training_step returned {found}.*return a dict"):
            Returns(tiny_config(tmp_path)).fit()


@pytest.mark.parametrize(
    ("calls_backward", "training", "num_batches"),
    [
        (False, {}, 1),
        (False, {"gradient_accumulation_steps": 3}, 3),
        (True, {"gradient_accumulation_steps": 3}, 3),
        (False, {"warm_up_batches": 2}, 3),
        (True, {}, 8),  # maybe a rule of the user's own: warned of, and refused after an epoch
    ],
)
def test_a_run_without_a_step_is_refused_after_its_first_group(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    calls_backward: bool,
    training: dict[str, Any],
    num_batches: int,
) -> None:
    class Forgets(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
            if calls_backward:
                self.backward(loss)
            return loss

    with pytest.raises(
        RuntimeError, match=rf"no optimizer step after batch {num_batches};.*self\.step"
    ):
        Forgets(tiny_config(tmp_path, **training)).fit()
    assert ("batch 1 ended without self.step" in caplog.text) is (num_batches == 8)


def test_batches_that_only_collect_data_can_be_declared(tmp_path: Path) -> None:
    class Replays(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if self.local_batches >= 10 else {}

    trainer = Replays(tiny_config(tmp_path, n_epochs=2, warm_up_batches=10))
    trainer.fit()

    assert (trainer.global_step, trainer.local_batches) == (6, 16)


def test_each_step_of_a_batch_is_counted(tmp_path: Path) -> None:
    validated, saved = [], []

    class Notes(Callback[TinyTrainer]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if cadence.due(self.trainer.global_step):
                saved.append(self.trainer.global_step)

        def post_validation_epoch(self, result: dict[str, Any]) -> None:
            validated.append(self.trainer.global_step)

    class Updates(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for _ in range(12):
                result = super().training_step(batch, batch_idx)
            return result

        def configure_schedulers(self) -> None:
            self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1)

    cadence = Every(steps=10).start()
    config = tiny_config(tmp_path, [Notes()], max_steps=40, val_every_n_steps=15)
    trainer = Updates(config)
    trainer.fit()

    assert trainer.global_step == trainer.scheduler.last_epoch == 48
    assert validated == [24, 36, 48]
    assert saved == [12, 24, 36, 48]


def test_a_trainer_without_a_validation_step_says_so_when_there_is_a_validation_loader(
    tmp_path: Path,
) -> None:
    class NoValidation(TinyTrainer):
        validation_step = BaseTrainer.validation_step  # type: ignore[assignment]  # as if unwritten

    trainer = NoValidation(tiny_config(tmp_path))

    with pytest.raises(NotImplementedError, match="NoValidation has no validation_step; write one"):
        trainer.fit()

    assert trainer.global_step == 0
    NoValidation(tiny_config(tmp_path, val_every_n_steps=0)).fit()


def test_counters_are_read_only(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path))
    for name in ("global_step", "current_epoch", "local_batches"):
        with pytest.raises(AttributeError, match=f"only the loop changes {name}"):
            setattr(trainer, name, 3)


# Loaders without length


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(10))


def test_a_loader_without_length_continues_over_epochs_and_restarts_at_its_end(
    tmp_path: Path,
) -> None:
    seen = []

    class Streams(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return DataLoader(Stream(), batch_size=2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch.tolist())
            loss = self.model(torch.ones(1, 4)).sum()
            self.backward(loss)
            self.step(self.optimizer)
            return loss

    Streams(tiny_config(tmp_path, n_epochs=2, train_steps_per_epoch=3)).fit()

    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [0, 1]]
