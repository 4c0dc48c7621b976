from typing import Any

import pytest
import torch
from torch import nn

from dream_callbacks.summary.model_rows import Row, model_rows
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


class GPT(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (4, 4, 4), *, tied: bool = False) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(8, 4))
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(Block(width) for width in widths)
        self.head = nn.Linear(4, 10, bias=False)
        self.register_buffer("mask", torch.zeros(8, 8, dtype=torch.bool))
        if tied:
            self.head.weight = self.embed.weight


def rows(model: nn.Module, depth: int = 1) -> list[Row]:
    return list(model_rows({"gpt": model}, depth))


def names(model: nn.Module, depth: int = 1) -> list[str]:
    return ["  " * row.level + row.name for row in rows(model, depth)]


def test_a_depth_of_zero_shows_only_the_model():
    (row,) = rows(GPT(), 0)

    assert (row.name, row.kind, row.level) == ("gpt", "GPT", 0)
    assert row.num_parameters == sum(p.numel() for p in GPT().parameters())


def test_a_module_list_adds_no_level_and_equal_blocks_share_a_row():
    assert names(GPT()) == ["gpt", "  position", "  embed", "  blocks.0-2 (3 ×)", "  head"]


def test_children_of_equal_blocks_are_merged():
    assert names(GPT(), 3) == [
        "gpt",
        "  position",
        "  embed",
        "  blocks.0-2 (3 ×)",
        "    attention",
        "    mlp",
        "      0",
        "      1",
        "      2",
        "  head",
    ]
    attention = next(row for row in rows(GPT(), 3) if row.name == "attention")
    assert attention.num_parameters == 3 * (4 * 4 + 4)


def test_different_blocks_have_separate_rows():
    assert names(GPT((4, 4, 8, 8, 4)))[3:6] == [
        "  blocks.0-1 (2 ×)",
        "  blocks.2-3 (2 ×)",
        "  blocks.4",
    ]


@pytest.mark.parametrize("change", ["frozen", "dtype", "class"])
def test_blocks_that_differ_in_a_column_are_not_merged(change: str):
    model = GPT()
    if change == "frozen":
        model.blocks[1].attention.weight.requires_grad = False
    elif change == "dtype":
        model.blocks[1].attention.bfloat16()
    else:
        model.blocks[1].mlp[1] = nn.ReLU()

    assert "  blocks.1" in names(model)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_rows_of_each_level_add_up(depth: int):
    found = rows(GPT(), depth)
    deepest: list[Row] = [
        row
        for row, following in zip(found, [*found[1:], None], strict=True)
        if following is None or following.level <= row.level
    ]

    assert sum(row.num_parameters for row in deepest) == found[0].num_parameters


def test_tied_parameters_count_once_and_name_their_owner():
    gpt, *_, head = rows(GPT(tied=True))

    assert gpt.num_parameters == sum(p.numel() for p in GPT(tied=True).parameters())
    assert (head.num_parameters, head.num_bytes) == (0, 0)
    assert head.tied_to == ("embed.weight",)


def test_a_block_used_several_times_counts_once():
    block = Block(4)
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(block, nn.Linear(2, 2))})
    found = {row.name: row for row in rows(model)}

    assert found["gpt"].num_parameters == found["a"].num_parameters + 6
    assert found["b"].num_parameters == 6
    assert found["b"].tied_to[0] == "a.attention.weight"


def test_frozen_parameters_are_not_trainable():
    model = GPT()
    model.embed.requires_grad_(False)
    gpt, _, embed, *_ = rows(model)

    assert embed.num_trainable == 0
    assert gpt.num_trainable == gpt.num_parameters - 40


def test_bytes_include_parameters_and_buffers():
    gpt, position, *_ = rows(GPT().bfloat16())

    assert position.num_bytes == 32 * 2
    assert gpt.num_bytes == gpt.num_parameters * 2 + 64


def test_all_dtypes_are_shown():
    model = GPT()
    model.embed.bfloat16()

    assert rows(model)[0].dtypes == ("float32", "bfloat16")


def test_models_on_the_meta_device_have_the_same_rows():
    with torch.device("meta"):
        on_meta = GPT()

    assert rows(on_meta, 2) == rows(GPT(), 2)


def test_lazy_parameters_count_as_zero():
    row = rows(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)))[1]

    assert (row.name, row.num_parameters, row.num_bytes) == ("0", 0, 0)


def test_the_total_of_several_models_counts_shared_parameters_once():
    one, other = GPT(), GPT()
    other.embed = one.embed
    *_, total = model_rows({"one": one, "other": other}, 1)

    assert (total.name, total.level) == ("total", 0)
    assert total.num_parameters == 2 * sum(p.numel() for p in one.parameters()) - 40


def test_a_compiled_model_is_shown_without_its_wrapper():
    compiled: Any = torch.compile(GPT(), backend="eager")

    assert names(compiled) == names(GPT())
    assert rows(compiled)[0].kind == "GPT"


def test_a_model_without_modules_is_one_row():
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))

    assert names(Bias(), 5) == ["gpt"]


def test_a_model_without_parameters_is_shown():
    (row, *_) = rows(nn.Sequential(nn.ReLU(), nn.Flatten()))

    assert (row.num_parameters, row.dtypes, row.placements) == (0, (), ())


def rows_in_layout(root_dir: str, device: DeviceParameters) -> list[Any]:
    trainer = TinyTrainer(tiny_config(root_dir, device=device))
    trainer.setup()
    return list(model_rows(trainer.named_models(), 1))


def rows_on_two_ranks(tmp_path: Any, device: DeviceParameters) -> list[list[Row]]:
    return run_on_ranks(rows_in_layout, 2, str(tmp_path), device)


def test_sharded_parameters_count_over_all_ranks_and_their_bytes_per_rank(tmp_path: Any):
    whole = rows_in_layout(str(tmp_path), DeviceParameters.SINGLE_DEVICE(device="cpu"))
    first, second = rows_on_two_ranks(tmp_path, DeviceParameters.FSDP(device="cpu"))

    assert [row.num_parameters for row in first] == [row.num_parameters for row in whole]
    assert [row.kind for row in first] == ["TinyModel", "Linear", "Linear", "Linear"]
    assert {row.placements for row in first} == {("sharded (dp_shard)",)}
    assert first[0].num_bytes + second[0].num_bytes == whole[0].num_bytes
    assert first[0].num_bytes < whole[0].num_bytes


def test_ddp_parameters_are_replicated(tmp_path: Any):
    whole = rows_in_layout(str(tmp_path), DeviceParameters.SINGLE_DEVICE(device="cpu"))
    first, _ = rows_on_two_ranks(tmp_path, DeviceParameters.DDP(device="cpu"))

    assert {row.placements for row in first} == {("replicated",)}
    assert first == whole
