"""What the environment says of terminals and colours isn't for the tests."""

import pytest


@pytest.fixture(autouse=True)
def _without_wishes_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
