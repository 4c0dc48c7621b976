"""ModelWatchCallback: logs norms and histograms of gradients and parameters."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from dream_callbacks.logging.sinks.base import OpenedSink
from dream_callbacks.logging.tensor_stats import TensorStats, tensor_stats
from dream_trainer.callbacks import Callback, Every
from dream_trainer.trainer.mixins import LoggerMixin

Watched = Literal["gradients", "parameters", "all"]

_Pending = tuple[str, list[str], TensorStats]
"""Kind ("gradient" or "parameter"), names of the parameters, and their statistics."""


class ModelWatchCallback(Callback[LoggerMixin]):
    """Logs `gradient_norm/<parameter>` and `parameter_norm/<parameter>`, their totals
    `gradient_norm` and `parameter_norm`, and histograms `gradients/<parameter>` and
    `parameters/<parameter>`.

    Gradients are those that the optimizer step uses, after clipping; parameters are read after
    the step. Both cover the whole tensor, however it is sharded. Infinite and NaN values make the
    norm infinite or NaN and are left out of the histogram. A step that logs costs a few kernels
    per parameter and three small collectives; other steps cost nothing.

    Args:
        log: "gradients", "parameters" or "all".
        log_freq: Log every n optimizer steps. Of several updates in a batch, the first one.
        histograms: False logs norms only.

    Raises:
        ValueError: If `log` is unknown or `log_freq` is below 1.
    """

    def __init__(
        self, log: Watched = "gradients", log_freq: int = 100, *, histograms: bool = True
    ) -> None:
        if log not in ("gradients", "parameters", "all"):
            raise ValueError(f'log={log!r}: "gradients", "parameters" or "all" is required')
        self.log = log
        self.log_freq = log_freq
        self.histograms = histograms
        self._every = Every(steps=log_freq)
        self._pending: list[_Pending] = []

    def pre_fit(self) -> None:
        self._pending = []
        self._cadence = self._every.start(self.trainer.global_step)
        self._step = -1

    def pre_optimizer_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self.log != "parameters" and self._is_due():
            parameters = self._parameters(optimizer)
            self._record("gradient", {name: p.grad for name, p in parameters.items()})

    def post_optimizer_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self.log != "gradients" and self._is_due():
            parameters = self._parameters(optimizer)
            self._record("parameter", {name: p.detach() for name, p in parameters.items()})

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        # Read here, not in the hooks above, so that the device has other work queued.
        if self._pending:
            pending, self._pending = self._pending, []
            if self.trainer.sinks:
                self._log_norms(pending)
                for kind, names, stats in pending:
                    self._log_histograms(kind, names, stats)

    def _is_due(self) -> bool:
        step = self.trainer.global_step + 1  # it advances after the batch
        if step != self._step:
            self._step, self._step_is_due = step, self._cadence.due(step)
        return self._step_is_due

    def _parameters(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The optimizer's parameters by model and name."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        models = self.trainer.models_of(optimizer)
        return {
            f"{model_name}.{name}": parameter
            for model_name, model in models.items()
            for name, parameter in model.named_parameters()
            if id(parameter) in own
        }

    def _record(self, kind: str, tensors: dict[str, Tensor | None]) -> None:
        names = list(tensors)
        if names and not any(each[:2] == (kind, names) for each in self._pending):
            stats = tensor_stats(
                list(tensors.values()), self.trainer.world, with_histograms=self.histograms
            )
            self._pending.append((kind, names, stats))

    def _log_norms(self, pending: list[_Pending]) -> None:
        norms: dict[str, float] = {}
        totals: dict[str, float] = {}  # over all optimizers of the step
        for kind, names, stats in pending:
            for name, norm in zip(names, stats.norms(), strict=True):
                if norm is not None:
                    norms[f"{kind}_norm/{name}"] = norm
                    totals[f"{kind}_norm"] = math.hypot(totals.get(f"{kind}_norm", 0.0), norm)
        if norms:
            self.trainer.log_dict(totals | norms)

    def _log_histograms(self, kind: str, names: list[str], stats: TensorStats) -> None:
        trainer = self.trainer
        for name, histogram in zip(names, stats.histograms(), strict=True):
            if histogram is not None:
                for sink in trainer.sinks:
                    if isinstance(sink, OpenedSink):
                        sink.log_histogram(f"{kind}s/{name}", histogram, trainer.global_step)
