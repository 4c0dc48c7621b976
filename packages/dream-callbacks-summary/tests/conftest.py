"""Removes environment variables that change terminals and colors."""

import pytest


@pytest.fixture(autouse=True)
def _without_terminal_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
