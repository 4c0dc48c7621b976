"""Metrics of validation and of training: where they are found, when they are reset, their state."""

from __future__ import annotations

import copy
import logging
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import Recorder
from torch import Tensor, nn

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.trainer.metric_state import MetricState
from dream_trainer.trainer.metrics import compute_all, find_metrics


class Count:
    """Counts samples, and collects the sums of targets."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.count, self.sums = 0, torch.zeros(())
        self.history: list[Tensor] = []

    def update(self, y: Tensor) -> None:
        self.count += len(y)
        self.sums += y.sum()
        self.history.append(y.sum())

    def compute(self) -> float:
        return self.count


class CountModule(nn.Module):
    """The same with a buffer, as a module that holds another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(2))
        self.inner = nn.Module()
        self.inner.count = 0  # type: ignore[assignment]

    def reset(self) -> None:
        self.sums.zero_()
        self.inner.count = 0  # type: ignore[assignment]

    def update(self, y: Tensor) -> None:
        self.sums += y.sum()
        self.inner.count += len(y)  # type: ignore[operator]

    def compute(self) -> dict[str, Any]:
        return {"module_count": self.inner.count, "module_sum": self.sums[0].clone()}


# Where they are found


class Everywhere(TinyTrainer):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.made_in_init = Count()

    def configure_models(self) -> None:
        super().configure_models()
        self.made_with_models = CountModule()

    def configure_metrics(self) -> None:
        self.attribute = Count()
        self.by_name = {"a": Count(), "b": [Count()]}
        self.by_index = [Count(), self.attribute]
        self.modules_by_name = nn.ModuleDict({"m": CountModule()})
        self.modules_by_index = nn.ModuleList([nn.Linear(1, 1)])
        self._hidden = Count()
        self.kind, self.numbers = Count, list(range(5000))


def test_metrics_are_found_in_attributes_and_in_containers(tmp_path: Path) -> None:
    trainer = Everywhere(tiny_config(tmp_path))
    trainer.setup()

    assert {name: type(metric) for name, metric in trainer.named_metrics().items()} == {
        "made_in_init": Count,
        "made_with_models": CountModule,
        "attribute": Count,
        "by_name/a": Count,
        "by_name/b/0": Count,
        "by_index/0": Count,
        "modules_by_name/m": CountModule,
    }
    assert trainer.named_metrics()["by_name/b/0"] is trainer.by_name["b"][0]
    assert list(trainer.named_models()) == ["model"]
    assert dict(trainer.named_train_metrics()) == {}


def test_all_of_them_are_reset_and_computed(tmp_path: Path) -> None:
    class Validates(Everywhere):
        def configure_metrics(self) -> None:
            super().configure_metrics()
            del self.modules_by_name

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            for metric in self.named_metrics().values():
                metric.update(batch[1])

    recorder = Recorder()
    Validates(tiny_config(tmp_path, [recorder], n_epochs=2)).fit()

    results = [result for (result,) in recorder.arguments["post_validation_epoch"]]
    assert all(
        [result["made_in_init"], result["by_name/a"], result["module_count"]] == [8, 8, 8]
        for result in results
    )


def test_a_model_with_the_methods_of_a_metric_is_a_model(tmp_path: Path) -> None:
    class Online(nn.Linear):
        def update(self) -> None: ...
        def compute(self) -> None: ...
        def reset(self) -> None: ...

    class Trainer(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.online = Online(1, 1)

    trainer = Trainer(tiny_config(tmp_path))
    trainer.setup()
    assert list(trainer.named_models()) == ["model", "online"]
    assert dict(trainer.named_metrics()) == {}


def test_a_metric_made_with_models_on_the_meta_device_is_an_error_that_says_where_to(
    tmp_path: Path,
) -> None:
    (text,) = set(run_on_ranks(set_up_metric_on_meta, 2, str(tmp_path)))
    assert "the metric 'metric' can't be moved to cpu" in text
    assert "assign it in configure_metrics or configure_train_metrics, not in" in text


def set_up_metric_on_meta(root: str) -> str:
    class Trainer(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.metric = CountModule()

        def init_weights(self) -> None:
            for parameter in self.model.parameters():
                nn.init.zeros_(parameter)

    with pytest.raises(RuntimeError) as caught:
        Trainer(tiny_config(root, device=DeviceParameters.FSDP(device="cpu"))).setup()
    return str(caught.value)


# Keys


class Scores(Count):
    def compute(self) -> Any:
        return {"score": 1.0}


def test_two_metrics_with_one_key_are_an_error_that_names_both(tmp_path: Path) -> None:
    class Trainer(TinyTrainer):
        def configure_metrics(self) -> None:
            self.easy, self.hard = Scores(), Scores()

    with pytest.raises(
        ValueError,
        match="the metrics 'easy' and 'hard' both have the value 'score'.* give one of them a "
        r'prefix, as in MetricCollection\(…, prefix="hard/"\), or other keys in the dict',
    ):
        Trainer(tiny_config(tmp_path)).fit()


def test_collections_with_a_common_key_are_an_error_before_training(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Trainer(TinyTrainer):
        prefix: str | None = None

        def configure_metrics(self) -> None:
            self.easy = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError()])
            self.hard = self.easy.clone(prefix=self.prefix)

    with pytest.raises(ValueError, match="'easy' and 'hard' both have the value 'MeanSquaredErr"):
        Trainer(tiny_config(tmp_path)).setup()
    Trainer.prefix = "hard/"
    Trainer(tiny_config(tmp_path)).setup()


def test_numbers_of_metrics_are_plain() -> None:
    class Odd(Count):
        def compute(self) -> Any:
            numpy = pytest.importorskip("numpy")
            return {
                "array": numpy.ones(1),
                "graph": torch.ones((), requires_grad=True),
                "by_class": torch.zeros(3),
            }

    values = compute_all({"odd": Odd()})
    assert type(values["array"]) is float
    assert not values["graph"].requires_grad
    assert values["by_class"].shape == (3,)


def test_hidden_attributes_and_deep_structures_are_not_searched() -> None:
    deep: Any = Count()
    for _ in range(9):
        deep = [deep]
    found = find_metrics({"_hidden": Count(), "deep": deep, "long": [Count()] * 2000})
    assert list(found) == []


# Training


class Training(TinyTrainer):
    """Counts samples in training and in validation."""

    def configure_metrics(self) -> None:
        self.val_count = Count()

    def configure_train_metrics(self) -> None:
        self.train_count = Count()
        self.train_modules = [CountModule()]

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.train_count.update(batch[1])
        self.train_modules[0].update(batch[1])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_count.update(batch[1])


def test_metrics_of_training_cover_the_epoch_and_no_validation_resets_them(tmp_path: Path) -> None:
    recorder = Recorder()
    config = tiny_config(
        tmp_path, [recorder], n_epochs=2, val_every_n_steps=3, num_sanity_val_steps=1
    )
    trainer = Training(config)
    trainer.fit()

    results = [result for (result,) in recorder.arguments["post_train_epoch"]]
    assert [result["train_count"] for result in results] == [32, 32]
    assert [result["module_count"] for result in results] == [32, 32]
    assert all("val_count" not in result for result in results)
    runs = [result for (result,) in recorder.arguments["post_validation_epoch"]]
    assert runs[-1] == {"val_count": 8}
    assert list(trainer.named_metrics()) == ["val_count"]
    assert list(trainer.named_train_metrics()) == ["train_count", "train_modules/0"]


def test_without_validation_they_are_reset_all_the_same(tmp_path: Path) -> None:
    class TrainsOnly(Training):
        def configure_dataloaders(self) -> Any:
            return super().configure_dataloaders()[0]

    recorder = Recorder()
    TrainsOnly(tiny_config(tmp_path, [recorder], n_epochs=3)).fit()

    results = [result["train_count"] for (result,) in recorder.arguments["post_train_epoch"]]
    assert results == [32, 32, 32]


def test_a_metric_of_training_with_the_name_of_a_result_is_an_error(tmp_path: Path) -> None:
    class Clashing(Training):
        def configure_train_metrics(self) -> None:
            super().configure_train_metrics()
            self.loss = Count()

    with pytest.raises(ValueError, match="'loss' is reported by training_step, and is the name of"):
        Clashing(tiny_config(tmp_path)).fit()


def train_with_torchmetrics(root: str) -> list[dict[str, Any]]:
    import torchmetrics

    class Trainer(TinyTrainer):
        def configure_train_metrics(self) -> None:
            self.train_mse = torchmetrics.MeanSquaredError()

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            x, y = batch
            with torch.no_grad():
                self.train_mse.update(self.model(x), y)
            return super().training_step(batch, batch_idx)

    recorder = Recorder()
    Trainer(tiny_config(root, [recorder], n_epochs=2)).fit()
    return [result for (result,) in recorder.arguments["post_train_epoch"]]


def test_torchmetrics_of_training_are_reduced_over_ranks(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    by_rank = run_on_ranks(train_with_torchmetrics, 2, str(tmp_path))

    assert by_rank[0] == by_rank[1]
    for result in by_rank[0]:
        assert result["train_mse"].item() == pytest.approx(result["loss"], rel=1e-5)


def test_a_run_that_stops_in_mid_epoch_continues_its_metrics(tmp_path: Path) -> None:
    recorder = Recorder()
    first = Training(tiny_config(tmp_path, max_steps=5))
    first.fit()
    second = Training(tiny_config(tmp_path, [recorder], max_steps=8))
    second.setup()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit()

    straight = Recorder()
    Training(tiny_config(tmp_path, [straight], max_steps=8)).fit()
    ((result,),) = recorder.arguments["post_train_epoch"]
    ((expected,),) = straight.arguments["post_train_epoch"]
    assert result == expected
    assert result["train_count"] == result["module_count"] == 32
    assert len(second.train_count.history) == 8


def test_a_state_without_the_metrics_of_training_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = TinyTrainer(tiny_config(tmp_path, max_steps=5))
    first.fit()
    second = Training(tiny_config(tmp_path, max_steps=8))
    second.setup()
    second.load_state_dict(first.state_dict())

    assert "metrics of training train_count, train_modules/0 isn't restored" in caplog.text
    assert "train_metrics" not in first.state_dict()["trainer"]


# State


def test_the_state_is_what_changed_since_the_reset() -> None:
    metric = CountModule()
    metric.threshold = 0.5  # type: ignore[assignment]
    state = MetricState(metric)
    metric.update(torch.ones(3))

    assert state.read() == {
        "": {"sums": pytest.approx(torch.full((2,), 3.0))},
        "inner": {"count": 3},
    }

    other = CountModule()
    other.threshold = 0.7  # type: ignore[assignment]
    assert MetricState(other).restore(state.read(), torch.device("cpu"))
    metric.update(torch.ones(3))
    assert (other.inner.count, other.sums.tolist()) == (3, [3.0, 3.0])
    assert other.threshold == 0.7
    assert "sums" in other.state_dict()


def test_a_metric_may_have_a_state_of_its_own() -> None:
    class Own(Count):
        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    metric, other = Own(), Own()
    state = MetricState(metric)
    metric.update(torch.ones(3))
    other_state = MetricState(other)

    assert state.read() == {"own": {"count": 3}}
    assert other_state.restore(state.read(), torch.device("cpu"))
    assert other.count == 3
    assert not other_state.restore({"": {}}, torch.device("cpu"))
    assert other.count == 0


def test_data_that_cannot_be_saved_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Window(Count):
        def reset(self) -> None:
            super().reset()
            self.window: deque[Tensor] = deque()

    class Trainer(TinyTrainer):
        def configure_train_metrics(self) -> None:
            self.recent = Window()

    trainer = Trainer(tiny_config(tmp_path))
    trainer.setup()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            trainer.state_dict()

    (record,) = caplog.records
    assert record.message.startswith("recent.window can't be saved, so a run that is resumed in")


@pytest.mark.parametrize("name", ["accuracy", "auroc", "collection", "mean", "minmax"])
def test_torchmetrics_continue_exactly(name: str) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    binary = torchmetrics.classification

    def make() -> Any:
        return {
            "accuracy": binary.BinaryAccuracy,
            "auroc": binary.BinaryAUROC,
            "collection": lambda: torchmetrics.MetricCollection(
                [binary.BinaryAccuracy(), binary.BinaryF1Score(), binary.BinaryAUROC()]
            ),
            "mean": torchmetrics.MeanMetric,
            "minmax": lambda: torchmetrics.MinMaxMetric(binary.BinaryAccuracy()),
        }[name]()

    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.rand(8, generator=generator), torch.randint(2, (8,), generator=generator))
        for _ in range(6)
    ]

    def update(metric: Any, batch: tuple[Tensor, Tensor]) -> None:
        metric.update(*batch[:1] if name == "mean" else batch)

    straight, first, second = make(), make(), make()
    first_state, second_state = MetricState(first), MetricState(second)
    for index, batch in enumerate(batches):
        update(straight, batch)
        if index == 3:
            assert second_state.restore(first_state.read(), torch.device("cpu"))
        update(first if index < 3 else second, batch)

    assert first_state.unsaved() == []
    assert second.compute() == straight.compute()
