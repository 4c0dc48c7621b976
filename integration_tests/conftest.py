"""The fixture `cell` and the option `--cell`; every test runs in its own folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # toy.py, tools

from tools import matrix  # noqa: E402  # found through the line above


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cell", help="run only the tests that take a cell, in this one")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        name = metafunc.config.getoption("--cell")
        quick = matrix.quick_cells(torch.cuda.device_count())
        metafunc.parametrize("cell", [matrix.cell_named(name)] if name else quick, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--cell"):
        takes_cell = [item for item in items if "cell" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in takes_cell])
        items[:] = takes_cell


@pytest.fixture(autouse=True)
def _on_its_backend(request: pytest.FixtureRequest) -> None:
    cell = request.node.callspec.params.get("cell") if hasattr(request.node, "callspec") else None
    if cell is not None and cell.backend == "nccl" and torch.cuda.device_count() < cell.ranks:
        pytest.skip(f"{cell.ranks} GPUs are required, and {torch.cuda.device_count()} are here")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
