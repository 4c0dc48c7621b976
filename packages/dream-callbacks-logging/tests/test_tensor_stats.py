from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dream_callbacks.logging.tensor_stats import tensor_stats
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import BlockingCopies
from dream_trainer.world import World


def test_statistics_of_tensors_on_a_gpu_never_wait_for_it():
    world = World(DeviceParameters(device="cpu"))
    world.device = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True), BlockingCopies() as copies:
        tensors = [torch.empty(8, 8, device="cuda"), torch.empty(8, device="cuda"), None]
        stats = tensor_stats(tensors, world, with_histograms=True)
        assert copies.found == []

        torch.ones(2).to("cuda:0")

    assert stats.sums.shape == (3, 3)
    assert copies.found == ["cpu to cuda:0"]


def test_bounds_cover_finite_values_and_are_empty_without_any():
    world = World(DeviceParameters(device="cpu"))
    values = torch.tensor([-2.0, 5.0, torch.inf, torch.nan])
    stats = tensor_stats([values, None], world, with_histograms=True)

    assert stats.bounds.tolist() == [[-2.0, 5.0], [torch.inf, -torch.inf]]
    first, second = stats.histograms()
    assert second is None
    assert first is not None
    assert sum(first.counts) == 2.0
