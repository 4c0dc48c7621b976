"""Overriding hooks: what may be left out and narrowed, and what is an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dream_trainer.callbacks import Callback, Every, RankLocal
from dream_trainer.trainer import BaseTrainer


class AsInTheGuide(Callback[BaseTrainer]):
    before = {"ProgressBar"}
    after = {Callback}

    def pre_train_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return batch

    def pre_validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None: ...

    def pre_optimizer_step(self, model: nn.Module, optimizer: Optimizer) -> None: ...

    @contextlib.contextmanager
    def train_context(self) -> Iterator[None]:
        yield

    def validation_context(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {"position": RankLocal(3), "every": Every(steps=3).steps}

    def load_state_dict(self, state_dict: dict[str, Any], trainer: BaseTrainer) -> None: ...


class WrongWishes(Callback[BaseTrainer]):
    before = 3  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


class WrongHooks(Callback[BaseTrainer]):
    def post_train_step(self, result: Tensor, batch_idx: int) -> None: ...  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]

    def pre_fit(self, trainer: BaseTrainer) -> None: ...  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]

    def post_train_epoch(self) -> None: ...  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]

    def state_dict(self) -> list[int]: ...  # type: ignore[override, empty-body]  # pyright: ignore[reportIncompatibleMethodOverride]
