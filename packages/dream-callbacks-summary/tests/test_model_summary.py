import contextlib
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from dream_callbacks.summary import ModelSummary
from dream_callbacks.summary.model_summary import model_table, num_bytes
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


def printed(root_dir: str, device: DeviceParameters | None = None, depth: int = 1) -> list[str]:
    config = tiny_config(root_dir, [ModelSummary(depth)], device=device)
    config.debug = True  # a collective in a rank-zero hook is an error then
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        TinyTrainer(config).setup()
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())  # if the environment enables colors
    return [line.rstrip() for line in text.splitlines()]


def test_the_modules_of_a_model_are_printed_as_a_table(tmp_path: Path):
    assert printed(str(tmp_path)) == [
        "module              type       parameters  trainable  dtype    bytes",
        "model               TinyModel         193        all  float32  772 B",
        "  embed             Linear             40        all  float32  160 B",
        "  blocks.0-1 (2 ×)  Linear            144        all  float32  576 B",
        "  head              Linear              9        all  float32   36 B",
    ]


def test_a_depth_of_zero_shows_only_the_model(tmp_path: Path):
    assert len(printed(str(tmp_path), depth=0)) == 2


def test_on_two_ranks_the_first_prints_placements(tmp_path: Path):
    first, second = run_on_ranks(printed, 2, str(tmp_path), DeviceParameters.FSDP(device="cpu"))

    assert second == []
    assert first[0].split("  ")[-1].strip() == "bytes per rank"
    assert first[2].split() == [
        *("embed", "Linear", "40", "all", "float32", "sharded", "(dp_shard)", "80", "B")
    ]


def test_frozen_and_tied_parameters_are_shown(tmp_path: Path):
    trainer = TinyTrainer(tiny_config(tmp_path))
    trainer.setup()
    model = trainer.model
    model.head.requires_grad_(False)
    model.embed.bias.requires_grad = False
    model.blocks[1].bias = model.blocks[0].bias
    model.blocks[1].weight.requires_grad = False
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(model_table({"model": model}, 1, is_distributed=False))
    _, whole, embed, first, second, head = console.export_text().splitlines()

    assert [line.split()[-4] for line in (whole, embed, head)] == ["104", "32", "none"]
    assert "Linear, tied to blocks.0.bias" in second
    assert "tied" not in first


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 * 2**29, "2.5 GiB"),
        (2**51, "2,048.0 TiB"),
    ],
)
def test_bytes_are_formatted_in_the_largest_unit_that_fits(count: int, expected: str):
    assert num_bytes(count) == expected


@pytest.mark.parametrize("depth", [-1, 1.5, True, None])
def test_an_invalid_depth_is_rejected(depth: int):
    with pytest.raises(ValueError, match="a whole number of at least 0 is required"):
        ModelSummary(depth)
