"""CollectiveGuard: makes collectives an error where other ranks would never join."""

from __future__ import annotations

from typing import Any, Self

from dream_trainer.world.torch_private import TorchDispatchMode, before_group_creation

RANK_ZERO = (
    "the other ranks don't run this hook and would never join; make the callback a plain "
    "Callback and ask world.is_global_zero before what only rank 0 does"
)
AFTER_ERROR = (
    "the other ranks may be gone and would never join; on_exception, and post_fit where "
    "trainer.exception is set, must do without collectives"
)


class CollectiveGuard(TorchDispatchMode):
    """Makes every collective of torch.distributed an error, in the thread that enters it.

    Also `dist.new_group`, `init_device_mesh` and other functions that make a process group, since
    each rank waits for the others there.

    Args:
        where: Named in the error.
        advice: The end of the error.
    """

    def __init__(self, where: str, advice: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._where = where
        self._advice = advice

    def __enter__(self) -> Self:
        self._group_guard = before_group_creation(lambda: self._refuse("making a process group"))
        self._group_guard.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch's
        self._group_guard.__exit__(None, None, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._refuse(func.name())
        return func(*args, **(kwargs or {}))

    def _refuse(self, collective: str) -> None:
        raise RuntimeError(refusal(collective, self._where, self._advice))


def refusal(collective: str, where: str, advice: str) -> str:
    """The message of the error for a collective that can't be called there."""
    return f"{collective} in {where}: {advice}"
