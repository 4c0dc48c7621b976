"""The integration matrix: which combinations are tested, and why the others are not.

    python tools/matrix.py              print it, with the left-out combinations by reason
    python tools/matrix.py --write      write the table of the documentation from it
    python tools/matrix.py --check      fail if that table is out of date

nox makes a session of each cell.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.environments import torch_pin
from tools.packages import BY_SHORT_NAME, CORE, Distribution, requirement_name

Layout = Literal["single", "ddp", "fsdp", "hsdp", "tp", "cp", "ddp+tp", "fsdp+tp", "fsdp+cp"]
Torch = Literal["pinned", "oldest"]
Backend = Literal["gloo", "nccl"]

RANKS = (1, 2, 4)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PACKAGES = ("core", *(f"core+{name}" for name in BY_SHORT_NAME if name != "core"), "all")
TORCH: tuple[Torch, ...] = ("pinned", "oldest")
BACKENDS: tuple[Backend, ...] = ("gloo", "nccl")

OF_TWO_AXES = ("hsdp", "ddp+tp", "fsdp+tp", "fsdp+cp")

PAGE = Path(__file__).resolve().parent.parent / "docs/how-to/layouts.md"
BEGIN, END = "<!-- begin: made by tools/matrix.py -->", "<!-- end: made by tools/matrix.py -->"


@dataclass(frozen=True)
class Cell:
    """One combination.

    Args:
        ranks: Processes that train together.
        layout: How they divide the model and the data.
        packages: Which distributions are installed: `core`, `core+<one>` or `all`.
        torch: The pinned version, or the oldest that core admits.
        backend: gloo on the CPU, NCCL on GPUs.
    """

    ranks: int
    layout: Layout
    packages: str
    torch: Torch = "pinned"
    backend: Backend = "gloo"

    def __str__(self) -> str:
        parts = [f"w{self.ranks}", self.layout, self.packages]
        parts += ["torch_oldest"] if self.torch == "oldest" else []
        parts += ["nccl"] if self.backend == "nccl" else []
        return "-".join(parts)

    @property
    def tags(self) -> tuple[str, ...]:
        """`quick` cells run for every change, all in one environment; `full` is all of them.

        Of the two backends, every change takes the one that the machine has.
        """
        is_quick = self.ranks <= 2 and (self.packages, self.torch) == ("all", "pinned")
        return ("quick", "full") if is_quick else ("full",)

    @property
    def distributions(self) -> list[Distribution]:
        """Distributions installed in its environment."""
        if self.packages == "all":
            return list(BY_SHORT_NAME.values())
        return [BY_SHORT_NAME[name] for name in self.packages.split("+")]

    @property
    def torch_requirement(self) -> str | None:
        """Requirement of torch to install instead of the pinned one; None for the pin."""
        return f"torch=={oldest_torch()}" if self.torch == "oldest" else None


def oldest_torch() -> str:
    """The oldest version of torch that core admits."""
    [bound] = (
        requirement
        for requirement in BY_SHORT_NAME["core"].pyproject()["project"]["dependencies"]
        if requirement_name(requirement) == "torch"
    )
    return str(bound.partition(">=")[2].partition(",")[0])


def reason_to_leave_out(cell: Cell) -> str | None:
    """Why a combination is not in the matrix; None if it is."""
    is_alone = cell.packages not in ("core", "all")
    few = (1, "single"), (2, "fsdp")
    rules = [
        (cell.layout == "single" and cell.ranks > 1, "single is one rank"),
        (cell.layout != "single" and cell.ranks == 1, "one rank has nothing to divide"),
        (
            cell.layout in OF_TWO_AXES and cell.ranks == 2,
            "two axes of two need 4 ranks",
        ),
        (
            is_alone and (cell.ranks, cell.layout) not in few,
            "a package alone meets the code of the other layouts in the cells with all packages",
        ),
        (
            cell.torch == "oldest" and cell.packages != "all",
            "the oldest torch is tried with all packages at once",
        ),
        (
            cell.backend == "nccl" and (cell.packages != "all" or cell.torch == "oldest"),
            "GPUs are scarce: NCCL is tried with all packages on the pinned torch",
        ),
    ]
    return next((reason for applies, reason in rules if applies), None)


def _combinations() -> list[Cell]:
    product = itertools.product(RANKS, LAYOUTS, PACKAGES, TORCH, BACKENDS)
    return [Cell(*values) for values in product]


CELLS: tuple[Cell, ...] = tuple(c for c in _combinations() if reason_to_leave_out(c) is None)
LEFT_OUT: dict[Cell, str] = {c: r for c in _combinations() if (r := reason_to_leave_out(c))}


def cell_named(name: str) -> Cell:
    """The cell named `name`.

    Raises:
        ValueError: If there is none; gives the reason why it is left out, or lists all.
    """
    for cell in CELLS:
        if str(cell) == name:
            return cell
    for cell, reason in LEFT_OUT.items():
        if str(cell) == name:
            raise ValueError(f"{name} is not in the matrix: {reason}")
    raise ValueError(f"there is no cell {name!r}; take one of {', '.join(map(str, CELLS))}")


def quick_cells(num_gpus: int) -> list[Cell]:
    """The quick cells, each with NCCL if there are GPUs for its ranks, else with gloo."""
    return [
        cell
        for cell in CELLS
        if "quick" in cell.tags and (cell.backend == "nccl") == (num_gpus >= cell.ranks)
    ]


def support_table() -> str:
    """Layouts by number of ranks, as a Markdown table: which backends are tested."""
    header = " | ".join(f"{n} rank{'s' * (n > 1)}" for n in RANKS)
    rows = [f"| layout | {header} |", "|---" * 4 + "|"]
    for layout in LAYOUTS:
        tested = [
            ", ".join(sorted({c.backend for c in CELLS if (c.ranks, c.layout) == (n, layout)}))
            for n in RANKS
        ]
        rows.append(f"| {layout} | {' | '.join(each or '–' for each in tested)} |")
    return "\n".join(rows)


def documentation() -> str:
    """The documentation of the matrix, as Markdown."""
    sets = ", ".join(f"`{name}`" for name in PACKAGES)
    reasons = "\n".join(
        f"- {reason} ({count})" for reason, count in Counter(LEFT_OUT.values()).items()
    )
    return (
        f"{support_table()}\n\n"
        f"Package sets, each installed alone from wheels: {sets}. "
        f"torch: the pin, and {oldest_torch()}, the oldest that is admitted. That makes "
        f"{len(CELLS)} cells. Left out of the {len(CELLS) + len(LEFT_OUT)} combinations:\n\n"
        f"{reasons}\n"
    )


def page_with(text: str, page: str) -> str:
    """The page with the part between the marks replaced.

    Raises:
        ValueError: If the marks aren't there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} … {END}; put both where the table belongs")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def main() -> int:
    """Print the cells, or write or check the documentation; 1 if the check fails."""
    if sys.argv[1:] in (["--write"], ["--check"]):
        page = PAGE.read_text(encoding="utf-8")
        wanted = page_with(documentation(), page)
        if sys.argv[1] == "--write":
            PAGE.write_text(wanted, encoding="utf-8")
        elif page != wanted:
            print(f"{PAGE.name} isn't what the matrix says: run python tools/matrix.py --write")
            return 1
        return 0
    for cell in CELLS:
        print(f"{cell!s:32} {' '.join(cell.tags)}")
    print(f"\n{len(CELLS)} cells; {torch_pin()} is pinned, {oldest_torch()} the oldest ({CORE}).")
    print(f"\n{support_table()}\n\nLeft out:")
    for reason, count in Counter(LEFT_OUT.values()).items():
        print(f"  {count:4}  {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
