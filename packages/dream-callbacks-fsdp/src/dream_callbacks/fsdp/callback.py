"""OptimizeFSDP: prefetches FSDP2 modules in their order of execution."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, ClassVar

from dream_trainer.callbacks import Callback

if TYPE_CHECKING:
    from dream_callbacks.fsdp.execution_order import Trace, Tracer
    from dream_callbacks.fsdp.prefetch_lists import PrefetchLists

logger = logging.getLogger(__name__)


class OptimizeFSDP(Callback):
    """Records the order of FSDP2 modules in the first optimizer step and prefetches by it.

    Each module starts the all-gathers of the following modules, in forward and in backward. A
    module is prefetched only by modules that it followed each time, and only below the same root,
    so modules that are called several times, recomputed, frozen or skipped are handled correctly.
    Without gradients, an unused prefetch would leave stale weights behind, so forward prefetching
    is disabled outside training batches: validation, and other callbacks that use the model, run
    as without this callback. Within a batch, a module called without gradients must be followed by
    the same modules as in the first step.

    Ranks must run their modules in the same order, as FSDP requires anyway; the orders are
    compared once. Costs 3 µs per FSDP module and batch. Does nothing if no model is sharded. Runs
    first in each hook, so that forward prefetching is off before other callbacks use the model.

    Args:
        prefetch: How many modules ahead. Each takes the memory of one gathered module.
        display: Show order and prefetch lists on global rank 0: with Python's logging at level
            INFO, or on standard error if that level is disabled.

    Raises:
        ValueError: If `prefetch` is below 1.
    """

    before: ClassVar[set[type]] = {Callback}

    def __init__(self, prefetch: int = 1, display: bool = False) -> None:
        if prefetch != int(prefetch) or prefetch < 1:
            raise ValueError(f"prefetch={prefetch!r}: a whole number of at least 1 is required")
        self.prefetch = prefetch
        self.display = display
        self._needs_trace = True
        self._tracer: Tracer | None = None
        self._lists: list[PrefetchLists] = []

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        for lists in self._lists:
            lists.use_in_forward()
        if self._needs_trace and self._tracer is None:
            self._start_tracing()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        for lists in self._lists:
            lists.stop_in_forward()
        if self._tracer is not None and not self.trainer.is_accumulating_gradients:
            traces = self._stop_tracing()
            if self._orders_agree(traces):
                self._apply(traces)

    def post_fit(self) -> None:
        # After an error in a batch, both may still be active.
        self._stop_tracing()
        for lists in self._lists:
            lists.stop_in_forward()

    def _start_tracing(self) -> None:
        roots = []
        # If it was never imported, nothing is sharded; importing it takes most of a second.
        if "torch.distributed.fsdp" in sys.modules:
            from dream_callbacks.fsdp.execution_order import Tracer, find_roots

            roots = find_roots(self.trainer.named_models())
        if not roots:
            logger.debug("no model is sharded with FSDP2; nothing to prefetch")
            self._needs_trace = False
            return
        self._tracer = Tracer(roots)
        self._tracer.start()

    def _stop_tracing(self) -> list[Trace]:
        tracer, self._tracer = self._tracer, None
        return [] if tracer is None else tracer.stop()

    def _orders_agree(self, traces: list[Trace]) -> bool:
        """Whether ranks with the same modules ran them in the same order. Collective."""
        self._needs_trace = False
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
                _display_text(str(lists))

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to other modules.
        fresh: dict[str, Any] = {"_needs_trace": True, "_tracer": None, "_lists": []}
        return super().__getstate__() | fresh


def _display_text(text: str) -> None:
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", text)
    else:
        sys.stderr.write(f"{text}\n")
