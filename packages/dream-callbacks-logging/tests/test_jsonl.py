from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from dream_callbacks.logging import Histogram, JSONLinesSink, LoggedRun, OpenedSink, read_jsonl

_KILLED = """
import sys
from pathlib import Path
from dream_callbacks.logging import JSONLinesSink, LoggedRun
run = LoggedRun(project="p", group="g", experiment="e", run_dir=Path(sys.argv[1]))
sink = JSONLinesSink().open(run)
for step in range(1, 10**9):
    sink.log_scalars({"loss": 1.0 / step}, step)
    print(step, flush=True)
"""


def opened(tmp_path: Path, step: int = 0) -> OpenedSink:
    run = LoggedRun(project="p", group="g", experiment="e", run_dir=tmp_path, step=step)
    return JSONLinesSink().open(run)


def lines(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


def test_scalars_become_one_line_with_step_and_time(tmp_path):
    sink = opened(tmp_path)
    before = time.time()
    sink.log_scalars({"train/loss": 0.5, "epoch": 1}, 7)
    sink.close()

    line = lines(tmp_path)[1]
    assert abs(line.pop("time") - before) < 5.0
    assert line == {"step": 7, "train/loss": 0.5, "epoch": 1}


def test_a_killed_process_loses_no_line(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    acknowledged = 0
    for text in process.stdout:
        acknowledged = int(text)
        if acknowledged >= 2000:
            process.kill()
            break
    rest = process.stdout.read().split("\n")
    acknowledged = int(rest[-2]) if len(rest) > 1 else acknowledged
    process.stdout.close()

    assert process.wait() == -signal.SIGKILL
    steps = [row["step"] for row in read_jsonl(tmp_path)]
    assert steps[:acknowledged] == list(range(1, acknowledged + 1))
    assert len(steps) <= acknowledged + 1


def test_a_forked_worker_writes_nothing(tmp_path):
    sink = opened(tmp_path)
    pid = os.fork()
    if pid == 0:
        sink.log_scalars({"from the child": 1.0}, 1)
        sink.log_images("from the child", torch.zeros(1, 1, 2, 2), 1)
        sink.close()
        os._exit(0)
    os.waitpid(pid, 0)
    sink.log_scalars({"from the parent": 1.0}, 2)
    sink.close()

    assert [list(row)[2:] for row in read_jsonl(tmp_path)] == [["from the parent"]]
    assert not (tmp_path / "media").exists()
    assert len(read_jsonl(tmp_path, "end")) == 1


def test_a_child_process_does_not_inherit_the_file(tmp_path):
    sink = opened(tmp_path)
    listing = (
        "import os, pathlib; print(*map(os.path.realpath, pathlib.Path('/proc/self/fd').iterdir()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", listing],
        capture_output=True,
        text=True,
        close_fds=False,
        check=True,
    )
    sink.close()

    assert "log.jsonl" not in result.stdout


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (float("nan"), "NaN"),
        (float("-inf"), "-Infinity"),
        (10**400, "Infinity"),
        (True, 1.0),
        (torch.tensor(0.25, dtype=torch.bfloat16), 0.25),
        (torch.tensor([3]), 3.0),
        (1 + 2j, "(1+2j)"),
        (None, None),
        (object, "builtins.object"),
        (object(), {"class": "object"}),
        ("text", "text"),
        ("\ud800", "\\ud800"),
        (torch.zeros(3, 2), "tensor((3, 2), torch.float32)"),
    ],
)
def test_values_of_any_type_are_written_as_strict_json(tmp_path, value, written):
    sink = opened(tmp_path)
    sink.log_scalars({"odd": value}, 1)
    sink.close()

    text = (tmp_path / "log.jsonl").read_text().splitlines()[1]
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))
    assert line["odd"] == written


def test_a_value_whose_methods_all_raise_does_not_end_the_run(tmp_path):
    class Hostile:
        def __getattribute__(self, name):
            raise RuntimeError(name)

    sink = opened(tmp_path)
    sink.log_scalars({"hostile": Hostile(), "loss": 1.0}, 1)  # type: ignore[dict-item]
    sink.close()

    (row,) = read_jsonl(tmp_path)
    assert row["loss"] == 1.0
    assert "Hostile" in row["hostile"]


def test_reserved_names_get_an_underscore(tmp_path):
    sink = opened(tmp_path)
    sink.log_scalars({"step": 1.0, "time": 2.0, "event": 3.0}, 9)
    sink.close()

    (row,) = read_jsonl(tmp_path)
    assert (row["step"], row["step_"], row["time_"], row["event_"]) == (9, 1.0, 2.0, 3.0)


def test_a_full_disk_is_reported_once_and_later_lines_are_written(tmp_path, caplog):
    sink = opened(tmp_path)
    size = (tmp_path / "log.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, limits[1]))  # in the middle of a line
    try:
        with caplog.at_level(logging.WARNING):
            for step in range(5):
                sink.log_scalars({"lost": 1.0}, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    sink.log_scalars({"kept": 1.0}, 6)
    sink.close()

    assert len(caplog.records) == 1
    assert "log.jsonl can't be written" in caplog.text
    assert [row.get("kept") for row in read_jsonl(tmp_path)] == [1.0]


def test_a_line_truncated_by_a_power_failure_does_not_swallow_the_next(tmp_path):
    sink = opened(tmp_path)
    sink.log_scalars({"loss": 1.0}, 1)
    sink.close()
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-20])

    sink = opened(tmp_path, step=1)
    sink.log_scalars({"loss": 2.0}, 2)
    sink.close()

    assert [row["loss"] for row in read_jsonl(tmp_path)] == [1.0, 2.0]


def test_images_and_videos_are_png_files_next_to_the_log(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    images = torch.zeros(2, 3, 4, 5)
    images[1, 0] = 1.0
    sink = opened(tmp_path)
    sink.log_images("val/../pictures", images, 3, captions=["black", "red"])
    sink.log_videos("clip", torch.rand(1, 6, 1, 4, 4), 3, fps=5)
    sink.close()

    (line,) = read_jsonl(tmp_path, "images")
    assert line["captions"] == ["black", "red"]
    assert line["files"] == [f"media/val/pictures/00000003-{index}.png" for index in (0, 1)]
    with image_module.open(tmp_path / line["files"][1]) as picture:
        assert picture.size == (5, 4)
        assert picture.getpixel((2, 2)) == (255, 0, 0)
    (clip,) = read_jsonl(tmp_path, "videos")
    with image_module.open(tmp_path / clip["files"][0]) as video:
        assert (video.n_frames, video.info["duration"]) == (6, 200.0)


def test_a_histogram_is_one_line(tmp_path):
    sink = opened(tmp_path)
    histogram = Histogram(counts=[1.0, 2.0], edges=[0.0, 0.5, 1.0], total=2, total_of_squares=2)
    sink.log_histogram("weights", histogram, 4)
    sink.close()

    (line,) = read_jsonl(tmp_path, "histogram")
    assert (line["low"], line["high"], line["counts"]) == (0.0, 1.0, [1, 2])


def test_identical_code_is_archived_once(tmp_path):
    code, run_dir = tmp_path / "code", tmp_path / "run"
    code.mkdir()
    (code / "train.py").write_text("print(1)\n")
    sink = opened(run_dir)
    sink.log_code(code)
    sink.log_code(code)
    (code / "train.py").write_text("print(2)\n")
    sink.log_code(code)
    sink.close()

    first, again, changed = (line["archive"] for line in lines(run_dir) if line["event"] == "code")
    assert first == again != changed
    with zipfile.ZipFile(run_dir / changed) as archive:
        assert archive.read("train.py") == b"print(2)\n"


def test_the_end_event_holds_the_error_that_ended_the_run(tmp_path):
    opened(tmp_path).close(ValueError("no luck"))

    assert read_jsonl(tmp_path, "end")[0]["error"] == "ValueError: no luck"
