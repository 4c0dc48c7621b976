"""Records the dtypes of reductions, for tests of precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Reductions(TorchDispatchMode):
    """Records the dtypes in which gradients are reduced, without collectives inside layers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.name():
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.dtypes.append(tensors[0].dtype)
        return func(*args, **(kwargs or {}))
