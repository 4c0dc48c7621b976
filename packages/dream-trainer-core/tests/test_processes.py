"""run_on_ranks: results and failures of a function on several processes."""

from __future__ import annotations

import faulthandler
import functools
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dream_trainer.testing import RankError, run_on_ranks

FACTOR = 10


@dataclass
class Point:
    x: int

    def scaled(self) -> int:
        return self.x * FACTOR


def environment() -> tuple[str, ...]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return tuple(os.environ[name] for name in names)


def rank() -> int:
    return int(os.environ["RANK"])


def test_results_are_ordered_by_rank_and_the_environment_is_torchruns() -> None:
    assert run_on_ranks(environment, 3) == [
        ("0", "0", "3", "3", "127.0.0.1"),
        ("1", "1", "3", "3", "127.0.0.1"),
        ("2", "2", "3", "3", "127.0.0.1"),
    ]


def summed() -> tuple[float, int]:
    dist.init_process_group("gloo")
    total = torch.tensor([float(rank() + 1)])
    dist.all_reduce(total)
    return total.item(), torch.get_num_threads()


def test_ranks_can_form_a_process_group_and_use_one_thread_each() -> None:
    assert run_on_ranks(summed, 2) == [(3.0, 1), (3.0, 1)]


def test_four_ranks_start_quickly() -> None:
    run_on_ranks(rank, 1)  # starts the server that the ranks are forked from
    start = time.monotonic()
    run_on_ranks(rank, 4)

    assert time.monotonic() - start < 5  # 0.3 s when nothing else runs; importing torch takes 4 × 2


# Functions, arguments and results


def test_lambdas_and_local_functions_keep_their_module_and_closure() -> None:
    offset = 5

    def local(point: Point, by: int = 2, *, more: int = 100) -> int:
        return point.scaled() * by + offset + more + rank()

    assert run_on_ranks(lambda: local(Point(1)) + FACTOR, 2) == [135, 136]
    assert run_on_ranks(local, 1, Point(3)) == [165]


def test_classes_functions_and_instances_of_a_test_module_can_be_sent_and_returned() -> None:
    def apply(functions: list[Callable[..., Any]], point: Point) -> list[Any]:
        return [function(point) for function in functions]

    functions = [Point.scaled, functools.partial(getattr, point_x := Point(7)), lambda p: p]
    [results] = run_on_ranks(apply, 1, [functions[0], functions[2]], Point(4))

    assert results == [40, Point(4)]
    assert run_on_ranks(functions[1], 1, "x") == [point_x.x]


def test_tensors_can_be_sent_and_returned() -> None:
    [result] = run_on_ranks(lambda tensor: {"twice": tensor * 2}, 1, torch.ones(3))

    assert torch.equal(result["twice"], torch.full((3,), 2.0))


def test_a_class_inside_a_function_is_refused_before_anything_starts() -> None:
    class Local: ...

    with pytest.raises(ValueError, match=r"Local is defined inside a function.*move it"):
        run_on_ranks(print, 1, Local())


SCRIPT = """
from dream_trainer.testing import run_on_ranks

class Doubles:
    def __call__(self, n):
        return 2 * n

if __name__ == "__main__":
    print(run_on_ranks(Doubles(), 2, 4), run_on_ranks(lambda: Doubles()(1), 1))
"""


def test_it_works_in_the_main_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[8, 8] [2]\n"


# Failures


def fails_on_one() -> str:
    if rank() == 1:
        raise ZeroDivisionError("planned")
    return "fine"


def test_an_error_of_one_rank_is_raised_with_its_traceback() -> None:
    with pytest.raises(RankError, match="1 of 3 ranks failed") as caught:
        run_on_ranks(fails_on_one, 3)

    assert list(caught.value.tracebacks) == [1]
    assert "in fails_on_one" in caught.value.tracebacks[1]
    assert "ZeroDivisionError: planned" in str(caught.value)


def test_an_error_keeps_no_object_with_threads_alive() -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(fails_on_one, 2)

    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    held = [value for frame in frames for value in frame.f_locals.values()]
    assert len(frames) > 1
    assert not [value for value in held if isinstance(value, dist.Store)]


def waits_for_one() -> None:
    if rank() == 1:
        raise ZeroDivisionError
    time.sleep(60)


def test_other_ranks_are_killed_soon_after_an_error() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="2 of 2 ranks failed") as caught:
        run_on_ranks(waits_for_one, 2)

    assert time.monotonic() - start < 20
    assert "ZeroDivisionError" in caught.value.tracebacks[1]
    assert "in waits_for_one" in caught.value.tracebacks[0]


def sleeps_on_one() -> None:
    if rank() == 1:
        time.sleep(60)


def test_a_rank_that_times_out_is_killed_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="1 of 2 ranks failed") as caught:
        run_on_ranks(sleeps_on_one, 2, timeout_s=2)

    assert time.monotonic() - start < 10
    assert "had not returned after 2 s" in caught.value.tracebacks[1]
    assert "in sleeps_on_one" in caught.value.tracebacks[1]


def test_a_rank_that_crashes_gives_its_traceback() -> None:
    with pytest.raises(RankError, match=r"exit code -11\nFatal Python error: Segmentation fault"):
        run_on_ranks(faulthandler._sigsegv, 1)  # noqa: SLF001  # there is no public way to crash


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_that_dies_is_an_error(code: int) -> None:
    with pytest.raises(RankError, match=f"the process died with exit code {code}"):
        run_on_ranks(os._exit, 1, code)


def test_a_script_that_starts_ranks_at_import_gets_a_hint(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from dream_trainer.testing import run_on_ranks\nrun_on_ranks(print, 1, 'called')\n"
    )

    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 1
    assert "died with exit code 1 before the function was called" in done.stderr
    assert 'under if __name__ == "__main__":' in done.stderr


def test_exit_is_an_error_of_the_rank() -> None:
    with pytest.raises(RankError, match="SystemExit: 0"):
        run_on_ranks(sys.exit, 1, 0)


def test_a_result_that_cannot_be_pickled_is_an_error_of_the_rank() -> None:
    with pytest.raises(RankError, match="pickle"):
        run_on_ranks(lambda: lambda: 1, 1)


def test_a_rank_error_is_an_assertion_error_that_names_the_rank() -> None:
    assert issubclass(RankError, AssertionError)
    with pytest.raises(RankError, match="--- rank 1 ---"):
        run_on_ranks(fails_on_one, 2)
