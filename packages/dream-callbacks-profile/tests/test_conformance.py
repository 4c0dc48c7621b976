"""Every callback of this package passes the conformance checks."""

from __future__ import annotations

import functools

import pytest

from dream_callbacks.profile import (
    BenchmarkCallback,
    CallbackCostCallback,
    FindGraphBreaksCallback,
    FindHostSyncsCallback,
    MemorySnapshotCallback,
    ProfileCallback,
)
from dream_trainer.callbacks import Every
from dream_trainer.testing.conformance import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(functools.partial(ProfileCallback, skip_first=1, warmup=1), id="profile"),
        pytest.param(FindGraphBreaksCallback, id="graph breaks"),
        pytest.param(
            functools.partial(BenchmarkCallback, skip=1, every=Every(steps=2)), id="benchmark"
        ),
        pytest.param(functools.partial(MemorySnapshotCallback, skip=0), id="memory"),
        pytest.param(
            functools.partial(FindHostSyncsCallback, skip=1, num_steps=3), id="host syncs"
        ),
        pytest.param(functools.partial(CallbackCostCallback, skip=1, num_steps=3), id="costs"),
    ],
)
def test_callback(make, check, tmp_path):
    check(make, tmp_path)
