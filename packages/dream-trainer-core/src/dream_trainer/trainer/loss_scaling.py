"""LossScale: keeps float16 gradients from underflowing (Micikevicius et al., 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_trainer.world import gradient_clipping, torch_private

if TYPE_CHECKING:
    from dream_trainer.world.world import World

_INITIAL, _GROWTH, _BACKOFF, _INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""As in torch.amp.GradScaler, which doesn't reduce over ranks of FSDP."""

_MOST_SKIPPED = 50


class LossScale:
    """A factor of the loss that halves when gradients overflow and doubles after 2000 steps.

    Args:
        world: Ranks that skip a step together.

    Attributes:
        scale: Scalar `()`, on the device, equal on all ranks.
        has_stepped: Whether a step came after the last update.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.scale = torch.full((), _INITIAL, device=world.device)
        self._growth_tracker = torch.zeros((), dtype=torch.int32, device=world.device)
        self._overflow = torch.zeros((), device=world.device)
        self.has_stepped = False
        self._num_skipped = 0

    def unscale(self, gradients: Sequence[Tensor]) -> Tensor:
        """Divide gradients by the scale. Collective.

        Returns:
            Scalar `()`: above 0 if a gradient of any rank isn't finite.
        """
        here = torch.zeros((), device=self._world.device)
        for (device, _), tensors in gradient_clipping.by_device_and_dtype(gradients).items():
            found = torch.zeros((), device=device)
            inverse = self.scale.reciprocal().to(device)  # exact: powers of two
            torch_private.unscale(tensors, found, inverse)
            here += found.to(here.device)
        overflow: Tensor = self._world.all_reduce(here, "max")
        self._overflow = torch.maximum(self._overflow, overflow)
        return overflow

    def skips(self, overflow: Tensor) -> bool:
        """Whether a step is to be skipped, on all ranks alike. Host sync.

        Raises:
            FloatingPointError: After many skipped steps in a row.
        """
        self.has_stepped = True
        if not overflow.item():
            self._num_skipped = 0
            return False
        self._num_skipped += 1
        if self._num_skipped > _MOST_SKIPPED:
            raise FloatingPointError(
                f"{self._num_skipped} steps in a row had gradients that aren't finite, also with a "
                f"loss scale of {self.scale.item():.3g}: training has diverged, or the model "
                "overflows in float16; use param_dtype=torch.bfloat16 or a lower learning rate"
            )
        return True

    def update(self) -> None:
        """Adapt the scale after a step, on the device."""
        self.has_stepped = False
        torch_private.update_scale(
            self.scale, self._growth_tracker, self._overflow, _GROWTH, _BACKOFF, _INTERVAL
        )
        self._overflow = torch.zeros_like(self._overflow)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers. Host sync."""
        return {
            "scale": self.scale.item(),
            "growth_tracker": self._growth_tracker.item(),
            "overflow": self._overflow.item(),
            "has_stepped": self.has_stepped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with a state that `state_dict` returned."""
        self.scale.fill_(state["scale"])
        self._growth_tracker.fill_(state["growth_tracker"])
        self._overflow.fill_(state["overflow"])
        self.has_stepped = state["has_stepped"]
