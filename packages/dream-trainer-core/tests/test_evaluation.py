"""validate, test and predict: without training, on any layout, and without a trace in training."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import Recorder
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.interface.trainer import Counters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import SimulatedWorld


def data(num_samples: int) -> TensorDataset:
    x = torch.randn(num_samples, 4, generator=torch.Generator().manual_seed(num_samples))
    return TensorDataset(x, torch.arange(float(num_samples))[:, None])


class Watches(Callback[Any]):
    """Keeps what runs, and the results of epochs."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        trainer = self.trainer
        self.seen.append((trainer.running, trainer.validation_set, batch_idx))

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.seen.append((self.trainer.running, dict(result)))


class CountsReads:
    """A training loader that must not be read."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.num_iterators = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        self.num_iterators += 1
        return iter(self.loader)


class Evaluated(TinyTrainer):
    def configure_dataloaders(self) -> Any:
        train, val = super().configure_dataloaders()
        self.train = CountsReads(train)
        return self.train, val


def true_loss(trainer: TinyTrainer, dataset: Any) -> float:
    x, y = dataset.tensors
    trainer.model.eval()
    with torch.no_grad():
        loss = F.mse_loss(trainer.model(x), y).item()
    trainer.model.train()
    return loss


def test_validate_sets_up_and_returns_what_callbacks_get(tmp_path: Path) -> None:
    watches = Watches()
    trainer = Evaluated(tiny_config(tmp_path, [watches]))

    result = trainer.validate()

    val: Any = trainer.val_dataloader
    assert result == {"val_loss": pytest.approx(true_loss(trainer, val.dataset), rel=1e-6)}
    assert watches.seen == [
        ("validate", None, 0),
        ("validate", None, 1),
        ("validate", result),
    ]
    assert trainer.train.num_iterators == 0
    assert trainer.running is None
    assert trainer.counters == Counters()


def test_a_finished_trainer_is_evaluated_and_trains_on(tmp_path: Path) -> None:
    trainer = Evaluated(tiny_config(tmp_path, n_epochs=1))
    trainer.fit()
    reads = trainer.train.num_iterators
    results = [trainer.validate(), trainer.validate()]
    trainer.test(DataLoader(data(3), 2))
    trainer.predict(DataLoader(data(3), 2))

    assert results[0] == results[1]
    assert trainer.train.num_iterators == reads
    trainer.training_parameters.n_epochs = 2
    trainer.fit()
    straight = Evaluated(tiny_config(tmp_path, n_epochs=2))
    straight.fit()
    assert all(
        torch.equal(value, straight.model.state_dict()[name])
        for name, value in trainer.model.state_dict().items()
    )


def test_only_hooks_of_validation_run(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = Evaluated(tiny_config(tmp_path, [recorder]))
    trainer.setup()
    num_before = len(recorder.events)
    step = [
        "pre_validation_step",
        "enter validation_context",
        "exit validation_context",
        "post_validation_step",
    ]

    trainer.test(DataLoader(data(3), 2))
    assert recorder.events[num_before:] == [
        "pre_validation_epoch",
        *step * 2,
        "post_validation_epoch",
    ]
    num_before = len(recorder.events)
    trainer.predict(DataLoader(data(3), 2))
    assert recorder.events[num_before:] == step * 2


def test_test_uses_validation_step_and_predict_the_models_forward(tmp_path: Path) -> None:
    trainer = Evaluated(tiny_config(tmp_path))
    dataset = data(5)

    assert trainer.test(DataLoader(dataset, 2)) == {
        "val_loss": pytest.approx(true_loss(trainer, dataset), rel=1e-6)
    }
    outputs = trainer.predict(DataLoader(dataset, 2))
    assert [len(output) for output in outputs] == [2, 2, 1]
    with torch.no_grad():
        assert torch.equal(torch.cat(outputs), trainer.model(dataset.tensors[0]))


class OwnSteps(Evaluated):
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"id": batch[1].mean(), "test_loss": 1.0}

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {
            "id": batch[1].flatten(),
            "text": [f"{batch_idx}/{i}" for i in range(len(batch[1]))],
        }

    def configure_test_dataloaders(self) -> Any:
        return {"small": DataLoader(data(3), 2), "large": DataLoader(data(5), 2)}


def test_steps_and_test_loaders_of_ones_own(tmp_path: Path) -> None:
    watches = Watches()
    trainer = OwnSteps(tiny_config(tmp_path, [watches]))

    assert trainer.test() == {
        "small/id": 1.0,
        "small/test_loss": 1.0,
        "large/id": 2.0,
        "large/test_loss": 1.0,
    }
    sets = [seen[1] for seen in watches.seen if seen[0] == "test" and len(seen) == 3]
    assert sets == ["small"] * 2 + ["large"] * 3
    first, *_, last = trainer.predict(DataLoader(data(3), 2), gather=True)
    assert first == {"id": torch.tensor(0.0), "text": "0/0"}
    assert last == {"id": torch.tensor(2.0), "text": "1/0"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda trainer: trainer.test(), r"test\(\) has no data: pass a loader"),
        (lambda trainer: trainer.validate(), r"validate\(\) has no data: there is no validation"),
        (lambda trainer: trainer.validate(checkpoint="best"), "add a CheckpointCallback"),
        (lambda trainer: trainer.predict({"a": DataLoader(data(2))}), "is a dict of loaders"),
        (lambda trainer: trainer.test(DataLoader(data(0))), "the test loader .* is empty"),
    ],
    ids=["no_test", "no_validation", "no_checkpoints", "dict", "empty"],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path: Path, call: Any, message: str) -> None:
    class NoValidation(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return super().configure_dataloaders()[0]

    trainer = NoValidation(tiny_config(tmp_path))
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=message):
        call(trainer)


def test_calls_are_not_nested(tmp_path: Path) -> None:
    class Validates(Callback[TinyTrainer]):
        def post_epoch(self) -> None:
            self.trainer.validate()

    with pytest.raises(RuntimeError, match=r"fit\(\) is running already"):
        TinyTrainer(tiny_config(tmp_path, [Validates()])).fit()


def test_simulated_ranks_are_refused(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path), world=SimulatedWorld(rank=0, world_size=4))

    for call in (trainer.validate, trainer.test, lambda: trainer.predict([])):
        with pytest.raises(RuntimeError, match=r"\(\) in SimulatedWorld"):
            call()


# Training goes on as if nothing had been evaluated


class Early(Callback[TinyTrainer]):
    """Early stopping, and ReduceLROnPlateau, as a user writes them."""

    def __init__(self) -> None:
        self.best = float("inf")
        self.num_worse = 0
        self.history: list[float] = []

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.history.append(result["val_loss"])
        self.num_worse = 0 if result["val_loss"] < self.best else self.num_worse + 1
        self.best = min(self.best, result["val_loss"])
        self.trainer.scheduler.step(result["val_loss"])  # type: ignore[attr-defined]
        if self.num_worse > 3:
            self.trainer.stop("no better")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "num_worse": self.num_worse, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


class WithPlateau(TinyTrainer):
    def configure_schedulers(self) -> None:
        self.scheduler = ReduceLROnPlateau(self.optimizer, patience=0, factor=0.5, threshold=1.0)


def summary(trainer: TinyTrainer) -> Any:
    state = copy.deepcopy(trainer.state_dict())
    own = state["trainer"]
    return (
        {name: value.tolist() for name, value in state["models"]["model"].items()},
        state["schedulers"],
        state["optimizers"]["optimizer"]["param_groups"],
        own["callbacks"],
        own["counters"],
    )


def test_evaluation_leaves_training_alone(tmp_path: Path) -> None:
    early = Early()
    trainer = WithPlateau(tiny_config(tmp_path, [early], n_epochs=3))
    trainer.setup()
    before = summary(trainer)
    for _ in range(6):
        trainer.validate()

    assert early.num_worse == 5, "it is there to be read"
    assert summary(trainer) == before
    assert trainer.stop_reason is None
    trainer.fit()
    straight = WithPlateau(tiny_config(tmp_path, [Early()], n_epochs=3))
    straight.fit()
    assert summary(trainer) == summary(straight)
    assert len(early.history) == 3


def test_a_run_that_ends_in_mid_epoch_saves_nothing_of_its_last_validation(tmp_path: Path) -> None:
    early = Early()
    stopped = WithPlateau(tiny_config(tmp_path, [early], max_steps=11))
    stopped.fit()
    saved = copy.deepcopy(stopped.state_dict())
    assert len(early.history) == 2, "the hooks have run"

    resumed = WithPlateau(tiny_config(tmp_path, [Early()], max_steps=20))
    resumed.setup()
    resumed.load_state_dict(saved)
    resumed.fit()
    stopped.training_parameters.max_steps = 20
    stopped.fit()
    straight = WithPlateau(tiny_config(tmp_path, [Early()], max_steps=20))
    straight.fit()

    assert summary(resumed) == summary(straight)
    assert summary(stopped) == summary(straight)


# Stops and errors


class StopsAt(Callback[TinyTrainer]):
    def __init__(self, batch_idx: int, how: str) -> None:
        self.batch_idx = batch_idx
        self.how = how
        self.num_batches = 0
        self.num_ended = 0

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.num_batches += 1
        self.trainer.at_end(self._end)
        if batch_idx == self.batch_idx and self.how == "stop":
            self.trainer.stop("enough")
        elif batch_idx == self.batch_idx and self.how == "signal":
            os.kill(os.getpid(), signal.SIGINT)
        elif batch_idx == self.batch_idx:
            raise ZeroDivisionError("planned")

    def _end(self) -> None:
        self.num_ended += 1


def test_a_stop_ends_an_evaluation_after_the_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stops = StopsAt(0, "stop")
    trainer = TinyTrainer(tiny_config(tmp_path, [stops]))

    assert trainer.validate() == {}
    assert trainer.predict(DataLoader(data(5), 2)) == []
    assert (stops.num_batches, stops.num_ended) == (2, 2)
    assert "validate() was stopped: enough" in caplog.text
    assert trainer.stop_reason is None
    trainer.callbacks.pop("StopsAt")
    trainer.fit()
    assert trainer.global_step == 8


def test_a_signal_ends_an_evaluation_after_the_batch(tmp_path: Path) -> None:
    stops = StopsAt(0, "signal")
    trainer = TinyTrainer(tiny_config(tmp_path, [stops]))

    with pytest.raises(KeyboardInterrupt):
        trainer.validate()
    assert (stops.num_batches, stops.num_ended) == (1, 1)


def test_what_at_end_was_given_is_called_after_an_error(tmp_path: Path) -> None:
    stops = StopsAt(1, "error")
    trainer = TinyTrainer(tiny_config(tmp_path, [stops]))

    with pytest.raises(ZeroDivisionError, match="planned"):
        trainer.validate()
    assert stops.num_ended == 2
    trainer.callbacks.pop("StopsAt")
    assert trainer.validate().keys() == {"val_loss"}


def test_an_error_of_at_end_is_raised(tmp_path: Path) -> None:
    class Fails(Callback[TinyTrainer]):
        def pre_validation_epoch(self) -> None:
            self.trainer.at_end(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        TinyTrainer(tiny_config(tmp_path, [Fails()])).validate()


# Predictions on ranks


class Predicts(TinyTrainer):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        outputs = self.model(x)
        # Rows of another length in each batch.
        return outputs.new_zeros(len(x), 1 + int(y[0])) + y, {"y": y, "out": outputs}


def predicted(root: str, layout: str, kind: str) -> Any:
    presets = {"ddp": DeviceParameters.DDP, "fsdp": DeviceParameters.FSDP}
    trainer = Predicts(tiny_config(root, device=presets[layout](device="cpu")))
    trainer.setup()
    world, dataset = trainer.world, data(7)
    if kind == "loader":
        loader: Any = trainer.loader(dataset, 4)
    elif kind == "shuffled":
        sampler: Any = DistributedSampler(dataset, world.dp_size, world.dp_rank, shuffle=True)
        loader = DataLoader(dataset, 2, sampler=sampler, num_workers=1)
    elif kind == "everything":
        loader = DataLoader(dataset, 2)
    else:
        loader = trainer.loader(data(1), 2)
    outputs = trainer.predict(loader, gather=True)
    own = trainer.predict(loader)
    return (
        [float(item[1]["y"]) for item in outputs],
        [item[0].tolist() for item in outputs],
        sum(len(item[0]) for item in own),
    )


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["loader", "shuffled", "everything", "one"])
def test_predictions_are_gathered_in_the_order_of_the_data_set(
    tmp_path: Path, layout: str, kind: str
) -> None:
    (ids, rows, num_first), (others, _, num_second) = run_on_ranks(
        predicted, 2, str(tmp_path), layout, kind
    )

    num_samples = 1 if kind == "one" else 7
    assert ids == list(range(num_samples))
    assert others == []
    assert all(set(row) == {float(index)} for index, row in enumerate(rows))
    assert num_first + num_second == (14 if kind == "everything" else num_samples)


class Samples(IterableDataset[Any]):
    def __iter__(self) -> Any:
        x, y = data(5).tensors
        return iter(list(zip(x, y, strict=True)))


def test_a_shuffled_loader_is_gathered_in_the_order_of_the_data_set(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path))

    outputs = trainer.predict(DataLoader(data(9), 2, shuffle=True), gather=True)
    with torch.no_grad():
        assert torch.allclose(torch.stack(outputs), trainer.model(data(9).tensors[0]))


def test_a_stream_is_gathered_in_its_order(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path))

    outputs = trainer.predict(DataLoader(Samples(), 2), gather=True)
    with torch.no_grad():
        assert torch.allclose(torch.stack(outputs), trainer.model(data(5).tensors[0]))


def test_batches_without_batching_are_samples(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path))

    outputs = trainer.predict(DataLoader(data(3), batch_size=None), gather=True)
    assert [tuple(output.shape) for output in outputs] == [(1,)] * 3


def predict_stream(root: str) -> None:
    trainer = TinyTrainer(tiny_config(root))
    trainer.predict(DataLoader(Samples(), 2), gather=True)


def test_an_order_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="can't know which samples of the data set a DataLoader"):
        run_on_ranks(predict_stream, 2, str(tmp_path))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.tensor(1.0), r"and one has shape \(\)"),
        (torch.zeros(3, 1), r"and one has shape \(3, 1\)"),
        (["a"], "and one is a list of 1"),
        (1.0, "and one is a float"),
    ],
    ids=["scalar", "short", "list", "float"],
)
def test_outputs_without_one_item_per_sample_are_refused(
    tmp_path: Path, output: Any, message: str
) -> None:
    class Odd(TinyTrainer):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return output

    trainer = Odd(tiny_config(tmp_path))
    with pytest.raises(ValueError, match=message):
        trainer.predict(DataLoader(data(4), 2), gather=True)
    assert len(trainer.predict(DataLoader(data(4), 2))) == 2


def test_a_dict_batch_becomes_keyword_arguments(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path))
    x = data(4).tensors[0]

    (output,) = trainer.predict([{"x": x}])
    (same,) = trainer.predict([x])
    assert torch.equal(output, same)


class TwoModels(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.other = torch.nn.Linear(1, 1)


def test_with_several_models_predict_step_must_be_written(tmp_path: Path) -> None:
    with pytest.raises(
        NotImplementedError, match=r"has 2 models \(model, other\) and no predict_step"
    ):
        TwoModels(tiny_config(tmp_path)).predict([data(2).tensors[0]])


# Checkpoints


class Halves(Callback[TinyTrainer]):
    """Loads other weights for an evaluation."""

    @torch.no_grad()
    def load_for_evaluation(self, checkpoint: Any) -> Counters:
        for parameter in self.trainer.model.parameters():
            local: Tensor = getattr(parameter, "to_local", lambda p=parameter: p)()
            local.mul_(0.5)
        return Counters(global_step=7, current_epoch=1)


class Steps(Callback[TinyTrainer]):
    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.step = self.trainer.global_step


def with_checkpoint(root: str) -> tuple[bool, bool, int, int]:
    steps = Steps()
    device = DeviceParameters.FSDP(device="cpu")
    trainer = TinyTrainer(tiny_config(root, [steps, Halves()], device=device))
    trainer.fit()
    before = trainer.validate()
    other = trainer.validate(checkpoint="best")
    return other == before, trainer.validate() == before, steps.step, trainer.global_step


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_weights_of_a_checkpoint_are_there_for_one_evaluation(
    tmp_path: Path, num_ranks: int
) -> None:
    outcomes = run_on_ranks(with_checkpoint, num_ranks, str(tmp_path))
    assert outcomes == [(False, True, 8, 8)] * num_ranks
