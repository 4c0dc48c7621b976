"""FindHostSyncsCallback finds operations that would sync on a GPU, and nothing else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dream_callbacks.profile import FindHostSyncsCallback
from dream_callbacks.profile.sync_watch import CudaWatch, DispatchWatch
from dream_trainer.callbacks import Callback
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class ReadLoss(Callback):
    """Reads the loss every third step."""

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self.trainer.global_step % 3 == 0:
            float(result["loss"])


class ReadInValidation(Callback):
    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        result["val_loss"].item()


def fit(tmp_path: Path, *callbacks: Callback, **training: Any) -> TinyTrainer:
    trainer = TinyTrainer(tiny_config(tmp_path, callbacks, **training))
    trainer.fit()
    return trainer


def steps_that_wait(callback: FindHostSyncsCallback) -> list[int]:
    return [step for step, syncs in callback.syncs.items() if syncs]


def test_steps_and_lines_with_syncs_are_found(tmp_path, caplog):
    callback = FindHostSyncsCallback(skip=1, num_steps=6)

    fit(tmp_path, ReadLoss(), callback)

    assert list(callback.syncs) == [2, 3, 4, 5, 6, 7]
    assert steps_that_wait(callback) == [3, 6]
    (sync,) = callback.syncs[3]
    assert 'float(result["loss"])' in sync.place
    assert "in 2 of 6 steps, at 1 place;" in caplog.text
    assert "2 ×  reading a value" in callback.path.read_text()


def test_syncs_of_callbacks_listed_after_it_are_found(tmp_path):
    callback = FindHostSyncsCallback(skip=0)

    fit(tmp_path, callback, ReadLoss())

    assert steps_that_wait(callback) == [3, 6]


def test_the_loop_and_the_optimizer_never_sync(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    callback = FindHostSyncsCallback(skip=0, num_steps=16)

    fit(tmp_path, callback, n_epochs=2, gradient_clip_val=0.1)

    assert len(callback.syncs) == 16
    assert steps_that_wait(callback) == []
    assert [r.levelno for r in caplog.records if "host–device syncs in" in r.message] == [
        logging.INFO
    ]


def test_validation_is_left_out(tmp_path):
    callback = FindHostSyncsCallback(skip=0)

    fit(tmp_path, ReadInValidation(), callback, val_every_n_steps=2)

    assert len(callback.syncs) == 8
    assert steps_that_wait(callback) == []


def test_the_batches_of_a_step_are_counted_together(tmp_path):
    class ReadEach(Callback):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            result["loss"].item()

    callback = FindHostSyncsCallback(skip=1)

    fit(tmp_path, ReadEach(), callback, gradient_accumulation_steps=2)

    assert {step: len(syncs) for step, syncs in callback.syncs.items()} == {2: 2, 3: 2, 4: 2}


def test_losses_are_the_same_with_and_without_it(tmp_path):
    class Losses(Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            self.seen.append(result["loss"])

    watched, plain = Losses(), Losses()

    fit(tmp_path, watched, FindHostSyncsCallback(skip=2, num_steps=3))
    fit(tmp_path, plain)

    assert torch.equal(torch.stack(watched.seen), torch.stack(plain.seen))


def test_an_error_while_watching_stops_the_watch(tmp_path):
    class Fail(Callback):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if batch_idx == 2:
                raise ArithmeticError("on purpose")

    callback = FindHostSyncsCallback(skip=0)

    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, Fail(), callback)

    assert torch._C._len_torch_dispatch_stack() == 0  # noqa: SLF001
    assert list(callback.syncs) == [1, 2]


def test_a_second_fit_watches_its_own_steps(tmp_path):
    callback = FindHostSyncsCallback(skip=1, num_steps=2)
    trainer = fit(tmp_path, callback)

    trainer.training_parameters.n_epochs = 2
    trainer.fit()

    assert list(callback.syncs) == [10, 11]


def test_compiled_models_keep_training_while_watched(tmp_path):
    class Compiled(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.model.compile(backend="eager")

    callback = FindHostSyncsCallback(skip=1, num_steps=3)
    trainer = Compiled(tiny_config(tmp_path, [callback, ReadLoss()]))

    trainer.fit()

    assert trainer.global_step == 8
    assert steps_that_wait(callback) == [3]


X = torch.tensor([1.0, 0.0, 2.0])


@pytest.mark.parametrize(
    ("operation", "waits"),
    [
        pytest.param(lambda: X[0].item(), True, id="item"),
        pytest.param(lambda: bool(X.sum() > 0), True, id="if"),
        pytest.param(lambda: int(X.argmax()), True, id="int"),
        pytest.param(lambda: X.nonzero(), True, id="nonzero"),
        pytest.param(lambda: X[X > 0], True, id="boolean mask"),
        pytest.param(lambda: X.clone().index_put_((X > 0,), X[0]), True, id="boolean put"),
        pytest.param(lambda: torch.masked_select(X, X > 0), True, id="masked_select"),
        pytest.param(lambda: X.unique(), True, id="unique"),
        pytest.param(lambda: torch.equal(X, X), True, id="equal"),
        pytest.param(lambda: X.repeat_interleave(torch.tensor([1, 2, 1])), True, id="repeat"),
        pytest.param(lambda: X[torch.tensor([0, 2])], False, id="index"),
        pytest.param(lambda: torch.where(X > 0, X, 0.0), False, id="where"),
        pytest.param(lambda: X.softmax(0).sum(), False, id="arithmetic"),
        pytest.param(lambda: X.clone().masked_fill_(X > 1, 0.0), False, id="masked_fill"),
    ],
)
def test_operations_that_would_sync_on_a_gpu_are_detected(operation, waits):
    watch = DispatchWatch()
    watch.start()
    try:
        operation()
    finally:
        watch.stop()

    assert bool(watch.take()) is waits


@pytest.mark.parametrize("options", [{"skip": -1}, {"num_steps": 0}], ids=str)
def test_invalid_options_are_rejected(options):
    with pytest.raises(ValueError, match="are required"):
        FindHostSyncsCallback(**options)


def _found_on_rank(root_dir: str) -> list[int]:
    callback = FindHostSyncsCallback(skip=0)
    fit(Path(root_dir), callback, ReadLoss())
    return steps_that_wait(callback)


def test_only_rank_zero_writes(tmp_path):
    first, second = run_on_ranks(_found_on_rank, 2, str(tmp_path))

    assert first == second == [3, 6]
    (log_file,) = tmp_path.rglob("host_syncs.log")
    assert log_file.read_text().count("# ") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_syncs_are_found():
    x = torch.ones(3, device="cuda")
    watch = CudaWatch()
    watch.start()
    try:
        x.sum().item()
    finally:
        watch.stop()

    (sync,) = watch.take()
    assert "x.sum().item()" in sync.place
