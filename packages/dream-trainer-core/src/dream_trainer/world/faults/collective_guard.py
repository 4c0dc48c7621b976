"""Collectives that are refused, where other ranks would never join."""

from __future__ import annotations

import threading
from typing import Any, Self

from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

RANK_ZERO = (
    "the other ranks don't run this hook and would never join; make the callback a plain "
    "Callback and ask world.is_global_zero before what only rank 0 does"
)
AFTER_ERROR = (
    "the other ranks may be gone and would never join; on_exception, and post_fit where "
    "trainer.exception is set, must do without collectives"
)

_NAME_GROUP = "_process_group_name"


class RefuseCollectives(TorchDispatchMode):
    """Makes every collective of torch.distributed an error, in the thread that enters it.

    Also `dist.new_group`, `init_device_mesh` and whatever else makes a process group: each rank
    waits for the others there, in C++ where no dispatch mode sees it. What they have in common is
    that torch names the new group by a function of its module.

    Args:
        where: Named in the error.
        advice: The end of the error.
    """

    def __init__(self, where: str, advice: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._where = where
        self._advice = advice

    def __enter__(self) -> Self:
        name_group, thread = getattr(distributed_c10d, _NAME_GROUP), threading.get_ident()

        def refuse_or_name(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                raise RuntimeError(refusal("making a process group", self._where, self._advice))
            return name_group(*args, **kwargs)

        self._name_group = name_group
        setattr(distributed_c10d, _NAME_GROUP, refuse_or_name)
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(self, *error: Any) -> None:
        setattr(distributed_c10d, _NAME_GROUP, self._name_group)
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch's

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(refusal(func.name(), self._where, self._advice))
        return func(*args, **(kwargs or {}))


def refusal(collective: str, where: str, advice: str) -> str:
    """Says why a collective can't be called there, and what to do instead."""
    return f"{collective} in {where}: {advice}"
