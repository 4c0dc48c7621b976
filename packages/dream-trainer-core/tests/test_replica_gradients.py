"""Ranks train as one process does, whatever parts and methods of a model a step calls."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 8)
        self.decoder = nn.Linear(8, 4)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(z)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def clip(self) -> None:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.4, 0.4)


class CallsMethods(TinyTrainer):
    """Calls no forward of the model; one head gets no gradient, though the optimizer decays it."""

    model: Autoencoder  # type: ignore[assignment]

    def configure_models(self) -> None:
        self.model = Autoencoder()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        z = self.model.encode(x)
        loss = F.mse_loss(self.model.decode(z), x) + F.mse_loss(self.model.heads["a"](z), y)
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
            self.model.clip()
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"val_loss": F.mse_loss(self.model(batch[0]), batch[0])}


class SeveralLosses(CallsMethods):
    """Each loss reaches another part of the model."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        self.backward(F.mse_loss(self.model.decode(self.model.encode(x)), x))
        head = self.model.heads["a" if batch_idx % 2 else "b"]
        self.backward(F.mse_loss(head(self.model.encode(x)), y))
        self.step(self.optimizer)
        return {}


class Unfreezes(CallsMethods):
    def configure_models(self) -> None:
        super().configure_models()
        self.model.encoder.requires_grad_(requires_grad=False)


class Toggles(CallsMethods):
    """Trains one part with even batches, the other with odd ones."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.model.encoder.requires_grad_(batch_idx % 2 == 0)
        self.model.decoder.requires_grad_(batch_idx % 2 == 1)
        return super().training_step(batch, batch_idx)


class TwoModels(CallsMethods):
    """The encoder and the decoder are models."""

    def configure_models(self) -> None:
        whole = Autoencoder()
        self.model, self.decoder = whole.encoder, whole.decoder  # type: ignore[assignment]

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.AdamW(
            [*self.model.parameters(), *self.decoder.parameters()], lr=0.01
        )

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"val_loss": self.decoder(self.model(batch[0])).mean()}


class OtherModelsOnOtherRanks(TwoModels):
    """Every other sample is for one model, the rest for the other."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x = batch[0]
        parts = [x[::2], x[1::2]] if self.world.dp_size == 1 else [x, x[:0]]
        first, second = reversed(parts) if self.world.dp_rank == 1 else parts
        loss = torch.zeros(())
        if len(first):
            loss = loss + self.model(first).square().sum()
        if len(second):
            loss = loss + self.decoder(second.repeat(1, 2)).square().sum()
        self.backward(loss, denominator=len(x))
        self.step(self.optimizer)
        return {}


class Alternates(TwoModels):
    """Each batch of a step is for another model."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x = batch[0]
        even = self.model(x) if batch_idx % 2 == 0 else self.decoder(x.repeat(1, 2))
        self.backward(even.square().mean())
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        return {}


class KeepsGradients(CallsMethods):
    """The second backward reaches one optimizer; the other has gradients of the first one."""

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.encoder.parameters(), lr=0.01)
        self.other = torch.optim.AdamW(
            [*self.model.decoder.parameters(), *self.model.heads.parameters()], lr=0.01
        )

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, _ = batch
        self.backward(F.mse_loss(self.model(x), x))
        self.step(self.optimizer)
        self.backward(self.model.encode(x).square().mean())
        self.step(self.optimizer)
        self.step(self.other)
        return {}


class LooksBeforeItSteps(CallsMethods):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, _ = batch
        self.backward(F.mse_loss(self.model(x), x))
        with torch.no_grad():
            loss = F.mse_loss(self.model(x), x)
        self.step(self.optimizer)
        return {"loss": loss}


class Unfreeze(Callback[TinyTrainer]):
    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 5:
            self.trainer.model.requires_grad_(requires_grad=True)


CASES: dict[str, tuple[type[TinyTrainer], int]] = {
    "methods": (CallsMethods, 1),
    "accumulation": (CallsMethods, 3),
    "several losses": (SeveralLosses, 1),
    "unfreezing": (Unfreezes, 1),
    "toggling": (Toggles, 1),
    "other models on other ranks": (OtherModelsOnOtherRanks, 1),
    "alternating models": (Alternates, 2),
    "kept gradients": (KeepsGradients, 1),
    "a forward before the step": (LooksBeforeItSteps, 1),
}
NOT_SHARDED = {"other models on other ranks", "alternating models"}
"""FSDP needs the same forwards on all ranks, and a backward of each unit in a step's last batch."""


def trained(trainer_class: type[TinyTrainer], root: str, layout: str, every: int) -> dict[str, Any]:
    device = getattr(DeviceParameters, layout)(device="cpu")
    config = tiny_config(root, [Unfreeze()], device=device, gradient_accumulation_steps=every)
    trainer = trainer_class(config)
    trainer.fit()
    return {
        name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
        for model in trainer.named_models().values()
        for name, p in model.named_parameters(prefix=str(id(model) == id(trainer.model)))
    }


def all_trained(root: str, layout: str) -> dict[str, dict[str, Any]]:
    return {
        name: trained(cls, root, layout, every)
        for name, (cls, every) in CASES.items()
        if layout != "FSDP" or name not in NOT_SHARDED
    }


@functools.cache
def outcomes(root: str, layout: str, num_ranks: int) -> list[dict[str, dict[str, Any]]]:
    return run_on_ranks(all_trained, num_ranks, root, layout)


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        (layout, case)
        for layout in ("DDP", "FSDP")
        for case in CASES
        if layout != "FSDP" or case not in NOT_SHARDED
    ],
)
def test_two_ranks_train_as_one_process(
    tmp_path_factory: pytest.TempPathFactory, layout: str, case: str
) -> None:
    root = str(tmp_path_factory.getbasetemp())
    (alone,) = outcomes(root, "SINGLE_DEVICE", 1)
    first, second = outcomes(root, layout, 2)

    for name, expected in alone[case].items():
        assert first[case][name].equal(second[case][name])
        torch.testing.assert_close(first[case][name], expected, rtol=1e-5, atol=1e-6)


class OnlyInTheFirst(CallsMethods):
    """The last batch of a step computes nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        if self.is_accumulating_gradients:
            self.backward(self.model(batch[0]).sum())
        else:
            self.step(self.optimizer)
        return {}


@pytest.mark.parametrize(
    ("layout", "trainer_class"),
    [("DDP", Toggles), ("DDP", OnlyInTheFirst), ("FSDP", Alternates)],
)
def test_gradients_that_no_backward_has_averaged_are_refused(
    tmp_path: Path, layout: str, trainer_class: type[TinyTrainer]
) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(trained, 2, trainer_class, str(tmp_path), layout, 2)

    for text in caught.value.tracebacks.values():
        assert "batches before accumulated gradients of model." in text


class TogglesInLowPrecision(CallsMethods):
    """FSDP first sees the decoder while it is frozen."""

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.encoder.parameters(), lr=0.01)
        self.other = torch.optim.AdamW(self.model.decoder.parameters(), lr=0.01)

    def configure_models(self) -> None:
        super().configure_models()
        self.model.heads.requires_grad_(requires_grad=False)

    def apply_fully_shard(self, config: dict[str, Any]) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.model.decoder, **config)
        fully_shard(self.model, **config)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        for optimizer in (self.optimizer, self.other):
            with self.toggled(optimizer):
                self.backward(F.mse_loss(self.model(batch[0]).float(), batch[0]))
            self.step(optimizer)
        return {}


def dtypes_of_toggled(root: str) -> set[torch.dtype]:
    device = DeviceParameters.FSDP(device="cpu", param_dtype=torch.bfloat16)
    trainer = TogglesInLowPrecision(tiny_config(root, device=device))
    trainer.fit()
    return {p.dtype for p in trainer.model.parameters()}


def test_fsdp_trains_in_low_precision_what_was_frozen_in_the_first_forward(tmp_path: Path) -> None:
    assert run_on_ranks(dtypes_of_toggled, 2, str(tmp_path)) == [{torch.float32}] * 2


class Unnamed(CallsMethods):
    """Calls a method that no step names."""

    def configure_models(self) -> None:
        self.model = Embeds()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.backward(embedded(self.model, batch[0]).sum())
        return {}


class Embeds(Autoencoder):
    def embed(self, x: Tensor) -> Tensor:
        out: Tensor = self.encoder(x)
        return out


def embedded(model: Any, x: Tensor) -> Any:
    return model.embed(x)


class CallsAPart(CallsMethods):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.backward(self.model.encoder(batch[0]).sum())
        return {}


class Rescales(Autoencoder):
    def rescale(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.encoder.weight.div_(x.norm())
        return x


class ChangesWeights(CallsMethods):
    def configure_models(self) -> None:
        self.model = Rescales()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.model.rescale(batch[0])  # type: ignore[operator]
        return {}


@pytest.mark.parametrize(
    ("trainer_class", "message"),
    [
        (Unnamed, 'register_fsdp_forward_method(self.…, "embed") with that module'),
        (CallsAPart, "shard the Linear by itself: fully_shard(self.…, **config)"),
        (ChangesWeights, "rescale of Rescales changed parameters while FSDP had them gathered"),
    ],
)
def test_a_use_of_parameters_that_fsdp_has_not_gathered_is_explained(
    tmp_path: Path, trainer_class: type[TinyTrainer], message: str
) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(trained, 2, trainer_class, str(tmp_path), "FSDP", 1)

    for text in caught.value.tracebacks.values():
        assert message in text
