"""Finds copies between devices that the host waits for, without a GPU."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class BlockingCopies(TorchDispatchMode):
    """Records copies between devices that the host waits for.

    Inside `FakeTensorMode(allow_non_fake_inputs=True)` it sees those of tensors on "cuda" on a
    machine without a GPU. `.item()` and Python conditions on a tensor raise there by themselves.

    Attributes:
        found: "cpu to cuda:0" for each copy, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        if func.overloadpacket.__name__ == "_to_copy" and not options.get("non_blocking"):
            if result.device != args[0].device:
                self.found.append(f"{args[0].device} to {result.device}")
        return result
