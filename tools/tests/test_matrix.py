from __future__ import annotations

import pytest

from tools import matrix
from tools.matrix import CELLS, LEFT_OUT, Cell, cell_named


def test_each_combination_is_in_the_matrix_or_left_out_with_a_reason() -> None:
    combinations = (
        len(matrix.RANKS)
        * len(matrix.LAYOUTS)
        * len(matrix.PACKAGES)
        * len(matrix.TORCH)
        * len(matrix.BACKENDS)
    )

    assert len(CELLS) + len(LEFT_OUT) == combinations
    assert not set(CELLS) & set(LEFT_OUT)
    assert all(LEFT_OUT.values())


def test_names_of_cells_are_readable_and_unique() -> None:
    assert str(Cell(2, "fsdp", "all")) == "w2-fsdp-all"
    assert str(Cell(4, "fsdp+tp", "all", "oldest")) == "w4-fsdp+tp-all-torch_oldest"
    assert len({str(cell) for cell in (*CELLS, *LEFT_OUT)}) == len(CELLS) + len(LEFT_OUT)


def test_each_layout_package_set_torch_and_backend_is_tested_somewhere() -> None:
    assert {cell.layout for cell in CELLS} == set(matrix.LAYOUTS)
    assert {cell.packages for cell in CELLS} == set(matrix.PACKAGES)
    assert {cell.torch for cell in CELLS} == set(matrix.TORCH)
    assert {cell.backend for cell in CELLS} == set(matrix.BACKENDS)
    assert {cell.ranks for cell in CELLS} == set(matrix.RANKS)


def test_quick_cells_share_one_environment_and_at_most_two_ranks() -> None:
    quick = [cell for cell in CELLS if "quick" in cell.tags]

    assert {cell.layout for cell in quick} >= {"single", "ddp", "fsdp"}
    assert {(cell.packages, cell.torch) for cell in quick} == {("all", "pinned")}
    assert max(cell.ranks for cell in quick) == 2


def test_package_sets_contain_the_named_packages() -> None:
    assert [d.short_name for d in Cell(1, "single", "core").distributions] == ["core"]
    assert [d.short_name for d in Cell(1, "single", "core+fsdp").distributions] == ["core", "fsdp"]
    assert len(Cell(1, "single", "all").distributions) == 6


def test_a_left_out_cell_is_refused_with_its_reason() -> None:
    with pytest.raises(ValueError, match="two axes of two need 4 ranks"):
        cell_named("w2-hsdp-all")
    with pytest.raises(ValueError, match="there is no cell 'w3-ddp-all'"):
        cell_named("w3-ddp-all")


def test_the_support_table_has_a_row_for_each_layout() -> None:
    table = matrix.support_table().splitlines()

    assert table[0] == "| layout | 1 rank | 2 ranks | 4 ranks |"
    assert "| hsdp | – | – | gloo, nccl |" in table
    assert len(table) == 2 + len(matrix.LAYOUTS)


@pytest.mark.parametrize("num_gpus", [0, 1, 2, 8])
def test_each_quick_cell_uses_the_backend_of_the_machine(num_gpus: int) -> None:
    cells = matrix.quick_cells(num_gpus)

    assert len({(cell.ranks, cell.layout) for cell in cells}) == len(cells) == 5
    for cell in cells:
        assert cell.backend == ("nccl" if num_gpus >= cell.ranks else "gloo")


def test_the_documentation_between_the_marks_is_replaced() -> None:
    page = f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter\n"
    found = matrix.page_with("new", page)

    assert found == f"before\n{matrix.BEGIN}\n\nnew\n{matrix.END}\nafter\n"
    assert matrix.page_with("new", found) == found
    with pytest.raises(ValueError, match="the page has no"):
        matrix.page_with("new", "no marks")


def test_the_documentation_gives_the_reason_of_each_left_out_combination() -> None:
    text = matrix.documentation()

    assert all(reason in text for reason in LEFT_OUT.values())
    assert f"{len(CELLS)} cells" in text
