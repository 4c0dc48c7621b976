"""OptimizeFSDP: prefetch FSDP2 modules in the order in which they really run."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, ClassVar

from dream_trainer.callbacks import Callback

if TYPE_CHECKING:
    from dream_callbacks.fsdp.prefetch_lists import PrefetchLists
    from dream_callbacks.fsdp.trace import Trace, Tracer

logger = logging.getLogger(__name__)


class OptimizeFSDP(Callback):
    """Finds the order of FSDP2 modules in the first optimizer step, and prefetches by it.

    Each module starts the all-gathers of those that follow it, in forward and in backward.
    A module is prefetched only by one that it followed each time, so modules that are called
    several times, recomputed, frozen or left out are right, and only below the same root.
    Without gradients a prefetch that isn't used would leave old weights behind, so nothing is
    prefetched in forward outside of training batches: validation, and what other callbacks do
    with the model, run as they would without this one. In a batch, a module that a step without
    gradients calls must be followed by the same modules as in the first step.

    Ranks must run their modules in the same order, as FSDP requires anyway; the orders are
    compared once. Costs 3 µs per FSDP module and batch. Does nothing where no model is sharded.
    The first in each hook, so that forward prefetching is off before others get at the model.

    Args:
        prefetch: How many modules ahead. Each one more takes the memory of a gathered module.
        display: Show order and lists on global rank 0: by Python's logging at level INFO, on
            standard error where that is off.

    Raises:
        ValueError: If `prefetch` is below 1.
    """

    before: ClassVar[set[type]] = {Callback}

    def __init__(self, prefetch: int = 1, display: bool = False) -> None:
        if prefetch != int(prefetch) or prefetch < 1:
            raise ValueError(f"prefetch={prefetch!r}: a whole number of at least 1 is required")
        self.prefetch = prefetch
        self.display = display
        self._is_undecided = True
        self._tracer: Tracer | None = None
        self._lists: list[PrefetchLists] = []

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        for lists in self._lists:
            lists.use_in_forward()
        if self._is_undecided and self._tracer is None:
            self._start_tracing()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        for lists in self._lists:
            lists.stop_in_forward()
        if self._tracer is not None and not self.trainer.is_accumulating_gradients:
            traces = self._stop_tracing()
            if self._agree(traces):
                self._apply(traces)

    def post_fit(self) -> None:
        # After an error in a batch both may still be on.
        self._stop_tracing()
        for lists in self._lists:
            lists.stop_in_forward()

    def _start_tracing(self) -> None:
        roots = []
        # Nothing is sharded where nobody imported it, which takes most of a second.
        if "torch.distributed.fsdp" in sys.modules:
            from dream_callbacks.fsdp.trace import Tracer, find_roots

            roots = find_roots(self.trainer.named_models())
        if not roots:
            logger.debug("no model is sharded with FSDP2, so there is nothing to prefetch")
            self._is_undecided = False
            return
        self._tracer = Tracer(roots)
        self._tracer.start()

    def _stop_tracing(self) -> list[Trace]:
        tracer, self._tracer = self._tracer, None
        return [] if tracer is None else tracer.stop()

    def _agree(self, traces: list[Trace]) -> bool:
        """Whether ranks with the same modules ran them in the same order. Collective."""
        self._is_undecided = False
        world = self.trainer.world
        if not world.is_distributed:
            return True
        mine = (world.pp_rank, [(trace.root.name, trace.events) for trace in traces])
        first_of_stage: dict[int, tuple[int, Any]] = {}
        for rank, (stage, order) in enumerate(world.all_gather(mine)):
            first_rank, expected = first_of_stage.setdefault(stage, (rank, order))
            if order != expected:
                if world.is_global_zero:
                    logger.warning(
                        "ranks %d and %d ran their FSDP modules in different orders, so nothing "
                        "is prefetched; make the model's control flow the same on all ranks",
                        first_rank,
                        rank,
                    )
                return False
        return True

    def _apply(self, traces: list[Trace]) -> None:
        from dream_callbacks.fsdp.prefetch_lists import PrefetchLists

        self._lists = [PrefetchLists(trace, self.prefetch) for trace in traces]
        for lists in self._lists:
            lists.use_in_backward()
            if self.trainer.world.device.type == "cpu":
                lists.gather_asynchronously()
        if self.display and self.trainer.world.is_global_zero:
            for lists in self._lists:
                _show(str(lists))

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other modules.
        fresh: dict[str, Any] = {"_is_undecided": True, "_tracer": None, "_lists": []}
        return super().__getstate__() | fresh


def _show(text: str) -> None:
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", text)
    else:
        sys.stderr.write(f"{text}\n")
