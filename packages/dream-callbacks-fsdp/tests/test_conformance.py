"""OptimizeFSDP passes the conformance checks."""

from __future__ import annotations

import pytest

from dream_callbacks.fsdp import OptimizeFSDP
from dream_trainer.testing.conformance import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_optimize_fsdp(check, tmp_path):
    check(OptimizeFSDP, tmp_path)
