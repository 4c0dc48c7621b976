from __future__ import annotations

from tools.oldest import exact_requirements, lower_bounds
from tools.packages import BY_SHORT_NAME, CORE


def test_lower_bounds_become_exact_requirements() -> None:
    assert exact_requirements(BY_SHORT_NAME["summary"]) == ["rich==13.7.0"]
    assert exact_requirements(BY_SHORT_NAME["core"]) == ["typing_extensions==4.12"]


def test_the_bound_on_core_is_the_checkouts_version_or_the_first_release() -> None:
    assert lower_bounds(BY_SHORT_NAME["fsdp"])[CORE] == BY_SHORT_NAME["core"].version()
