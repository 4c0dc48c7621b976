"""ModelWatchCallback: norms and histograms of gradients and parameters."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from dream_callbacks.logging.sinks.base import OpenedSink
from dream_callbacks.logging.tensor_stats import Statistics, statistics
from dream_trainer.callbacks import Callback, Every
from dream_trainer.trainer.mixins import LoggerMixin

Watched = Literal["gradients", "parameters", "all"]

_Seen = tuple[str, list[str], Statistics]
"""Of gradients or parameters, their names, and what was found."""


class ModelWatchCallback(Callback[LoggerMixin]):
    """Logs `gradient_norm/<parameter>` and `parameter_norm/<parameter>`, their totals
    `gradient_norm` and `parameter_norm`, and histograms `gradients/<parameter>` and
    `parameters/<parameter>`.

    Gradients are those that the step is made with, so after clipping; parameters are as the step
    leaves them. Both are of the whole tensor, however it is sharded. Infinite and NaN values make
    the norm so, and are left out of the histogram. Costs a few kernels for each parameter and
    three small collectives on a step that logs; nothing on the others.

    Args:
        log: "gradients", "parameters" or "all".
        log_freq: Optimizer steps between two times.
        histograms: False logs norms alone.

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
        self._seen: list[_Seen] = []

    def pre_fit(self) -> None:
        self._seen = []

    def pre_optimizer_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self.log != "parameters" and self._is_due():
            parameters = self._parameters(optimizer)
            self._look("gradient", {name: p.grad for name, p in parameters.items()})

    def post_optimizer_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self.log != "gradients" and self._is_due():
            parameters = self._parameters(optimizer)
            self._look("parameter", {name: p.detach() for name, p in parameters.items()})

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        # Read here and not in the hooks above, so that the device has had work to do meanwhile.
        if self._seen:
            seen, self._seen = self._seen, []
            if self.trainer.sinks:
                self._log_norms(seen)
                for kind, names, values in seen:
                    self._log_histograms(kind, names, values)

    def _is_due(self) -> bool:
        return self._every.due(self.trainer.global_step + 1)  # it advances after the step

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

    def _look(self, kind: str, tensors: dict[str, Tensor | None]) -> None:
        if tensors:
            values = statistics(
                list(tensors.values()), self.trainer.world, with_histograms=self.histograms
            )
            self._seen.append((kind, list(tensors), values))

    def _log_norms(self, seen: list[_Seen]) -> None:
        norms: dict[str, float] = {}
        totals: dict[str, float] = {}  # over all optimizers that made the step
        for kind, names, values in seen:
            for name, norm in zip(names, values.norms(), strict=True):
                if norm is not None:
                    norms[f"{kind}_norm/{name}"] = norm
                    totals[f"{kind}_norm"] = math.hypot(totals.get(f"{kind}_norm", 0.0), norm)
        if norms:
            self.trainer.log_dict(totals | norms)

    def _log_histograms(self, kind: str, names: list[str], values: Statistics) -> None:
        trainer = self.trainer
        for name, histogram in zip(names, values.histograms(), strict=True):
            if histogram is not None:
                for sink in trainer.sinks:
                    if isinstance(sink, OpenedSink):
                        sink.log_histogram(f"{kind}s/{name}", histogram, trainer.global_step)
