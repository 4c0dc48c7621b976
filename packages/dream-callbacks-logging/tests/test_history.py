from __future__ import annotations

import json
import math
from pathlib import Path

from dream_callbacks.logging import JSONLinesSink, LoggedRun, read_jsonl, series


def session(tmp_path: Path, start: int, values: list[tuple[int, dict[str, float]]]) -> None:
    run = LoggedRun(project="p", group="g", experiment="e", run_dir=tmp_path, step=start)
    sink = JSONLinesSink().open(run)
    for step, scalars in values:
        sink.log_scalars(scalars, step)
    sink.close()


def test_steps_repeated_after_a_resume_are_read_once(tmp_path):
    session(tmp_path, 0, [(step, {"loss": float(step)}) for step in range(1, 8)])
    session(tmp_path, 4, [(step, {"loss": step + 0.5}) for step in range(5, 10)])

    steps, losses = series(read_jsonl(tmp_path), "loss")
    assert steps == list(range(1, 10))
    assert losses == [1.0, 2.0, 3.0, 4.0, 5.5, 6.5, 7.5, 8.5, 9.5]


def test_a_run_that_restarted_from_the_beginning_has_no_earlier_history(tmp_path):
    session(tmp_path, 0, [(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    session(tmp_path, 0, [(1, {"loss": 10.0})])

    assert series(read_jsonl(tmp_path), "loss") == ([1], [10.0])


def test_a_value_logged_again_at_the_resumed_step_replaces_the_first(tmp_path):
    session(tmp_path, 0, [(4, {"loss": 4.0}), (4, {"val_loss": 1.0})])
    session(tmp_path, 4, [(4, {"val_loss": 2.0}), (5, {"loss": 5.0})])

    rows = read_jsonl(tmp_path)
    assert series(rows, "loss") == ([4, 5], [4.0, 5.0])
    assert series(rows, "val_loss") == ([4], [2.0])


def test_a_crash_right_after_a_resume_loses_no_history(tmp_path):
    session(tmp_path, 0, [(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    session(tmp_path, 2, [])
    session(tmp_path, 2, [(3, {"loss": 3.0})])

    assert series(read_jsonl(tmp_path), "loss") == ([1, 2, 3], [1.0, 2.0, 3.0])


def test_a_value_logged_twice_in_one_session_is_kept_twice(tmp_path):
    session(tmp_path, 0, [(1, {"val_batch/loss": 1.0}), (1, {"val_batch/loss": 2.0})])

    assert series(read_jsonl(tmp_path), "val_batch/loss") == ([1, 1], [1.0, 2.0])


def test_nan_and_infinities_are_read_back_as_floats(tmp_path):
    session(tmp_path, 0, [(1, {"a": math.nan, "b": math.inf, "c": -math.inf})])

    (row,) = read_jsonl(tmp_path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_garbage_in_the_file_is_skipped(tmp_path):
    session(tmp_path, 0, [(1, {"loss": 1.0})])
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"step": \n[1, 2]\n\n')
    session(tmp_path, 1, [(2, {"loss": 2.0})])

    assert series(read_jsonl(tmp_path / "log.jsonl"), "loss") == ([1, 2], [1.0, 2.0])


def test_events_are_read_by_name(tmp_path):
    session(tmp_path, 0, [])
    session(tmp_path, 3, [])

    assert [line["step"] for line in read_jsonl(tmp_path, "start")] == [0, 3]
    assert len(read_jsonl(tmp_path, "end")) == 2


def test_a_long_log_of_many_sessions_is_read_in_order(tmp_path):
    lines = []
    for start in range(0, 100_000, 1000):
        lines.append(json.dumps({"step": start, "time": 0.0, "event": "start"}))
        lines += [f'{{"step": {start + n}, "time": 0.0, "loss": 1.0}}' for n in range(1, 1501)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")

    steps, _ = series(read_jsonl(tmp_path), "loss")

    assert steps == list(range(1, 100_501))
