"""Collectives that are refused, where other ranks would never join."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

RANK_ZERO = (
    "the other ranks don't run this hook and would never join; make the callback a plain "
    "Callback and ask world.is_global_zero before what only rank 0 does"
)
AFTER_ERROR = (
    "the other ranks may be gone and would never join; on_exception, and post_fit where "
    "trainer.exception is set, must do without collectives"
)


class RefuseCollectives(TorchDispatchMode):
    """Makes every collective of torch.distributed an error.

    Args:
        where: Named in the error.
        advice: The end of the error.
    """

    def __init__(self, where: str, advice: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._where = where
        self._advice = advice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(refusal(func.name(), self._where, self._advice))
        return func(*args, **(kwargs or {}))


def refusal(collective: str, where: str, advice: str) -> str:
    """Says why a collective can't be called there, and what to do instead."""
    return f"{collective} in {where}: {advice}"
