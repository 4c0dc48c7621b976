from __future__ import annotations

import pytest

from tools.check_bounds import bounds_of, parsed, wrong_bound_on_core


def test_a_development_version_comes_before_its_release() -> None:
    assert parsed("0.1.0.dev0") < parsed("0.1.0") < parsed("0.1.1.dev3") < parsed("0.2")


def test_other_version_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="other forms"):
        parsed("1.0rc1")


def test_both_bounds_are_read() -> None:
    assert bounds_of("safetensors[torch]>=0.4.5,<1") == (parsed("0.4.5"), parsed("1"))
    assert bounds_of("rich") == (None, None)


@pytest.mark.parametrize(
    ("requirement", "core", "reason"),
    [
        ("dream-trainer-core", "0.1.0", "both bounds"),
        ("dream-trainer-core>=0.1.0,<1", "0.1.0", "has the form"),
        ("dream-trainer-core>=0.2.0.dev0,<1", "0.1.0", "refuses core 0.1.0"),
        ("dream-trainer-core>=0.2.0.dev0,<1", "1.0.0", "refuses core"),
        ("dream-trainer-core>=0.1.0.dev0,<2", "0.3.0", "next major"),
    ],
)
def test_a_wrong_bound_on_core_is_explained(requirement: str, core: str, reason: str) -> None:
    assert reason in (wrong_bound_on_core(requirement, core) or "")


def test_the_right_bound_on_core_is_accepted() -> None:
    assert wrong_bound_on_core("dream-trainer-core>=0.1.0.dev0,<1", "0.1.0.dev0") is None
    assert wrong_bound_on_core("dream-trainer-core>=0.1.0.dev0,<1", "0.4.2") is None
