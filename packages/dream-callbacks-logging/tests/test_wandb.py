from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dream_callbacks.logging import WandBSink, read_jsonl, series

pytest.importorskip("wandb")


@pytest.fixture
def run_script(tmp_path, wandb_environment):
    """Runs a function of wandb_runs.py; gives its process and the run's directory."""

    def run(name: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        directory = tmp_path / "runs"
        directory.mkdir(exist_ok=True)
        script = Path(__file__).with_name("wandb_runs.py")
        result = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", str(script), name, str(directory)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=wandb_environment | environment,
            timeout=100,
            check=False,
        )
        return result, directory / "dream-trainer" / "default" / "wandb_runs"

    return run


def reported(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_an_offline_run_holds_everything_that_was_logged(run_script, read_wandb, wandb_history):
    result, run_dir = run_script("offline")

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    rows = wandb_history(run_dir)
    by_step = {row["global_step"]: row for row in rows if "train/loss" in row}
    steps, losses = series(read_jsonl(run_dir), "train/loss")
    assert list(by_step) == steps == list(range(1, 9))
    assert [row["train/loss"] for row in by_step.values()] == losses
    assert by_step[3]["lr"] == 0.01, "one row for each step, whoever logged"
    assert by_step[8]["gradients/model.embed.weight"]["_type"] == "histogram"
    last = {name: value for row in rows for name, value in row.items()}
    assert last["val/pictures"]["count"] == 2
    assert last["val/clips"]["_type"] == "videos"
    assert last["val_loss"] == series(read_jsonl(run_dir), "val_loss")[1][-1]
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    records = read_wandb(path)
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.run_group, run.display_name) == (
        "dream-trainer",
        "default",
        "wandb_runs",
    )
    assert (list(run.tags), run.notes) == (["tiny"], "a note")
    metrics = [record.metric for record in records if record.HasField("metric")]
    assert any(metric.step_metric == "global_step" for metric in metrics)
    config = {
        item.key: json.loads(item.value_json)
        for record in records
        if record.HasField("config")
        for item in record.config.update
    }
    assert config["training_parameters"]["gradient_accumulation_steps"] == 1
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
    assert not list(run_dir.glob("wandb/to-log/*"))


def test_a_resumed_run_goes_on_under_its_id(run_script, wandb_history):
    first, run_dir = run_script("resumed")
    second, _ = run_script("resume")

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    ids = {path.stem for path in run_dir.glob("wandb/offline-run-*/*.wandb")}
    assert ids == {f"run-{json.loads((run_dir / 'wandb-run.json').read_text())['id']}"}
    steps = [row["global_step"] for row in wandb_history(run_dir) if "train/loss" in row]
    assert sorted(steps) == [1, 2, 3, 4, 4, 5, 5, 6, 7, 8]
    assert series(read_jsonl(run_dir), "train/loss")[0] == list(range(1, 9))


def test_a_run_that_starts_over_gets_a_new_id(run_script):
    run_script("resumed")
    _, run_dir = run_script("resumed")

    ids = {path.stem for path in run_dir.glob("wandb/offline-run-*/*.wandb")}
    assert len(ids) == 2


def test_a_frozen_wandb_core_costs_nothing_and_ends_in_bounded_time(run_script):
    result, run_dir = run_script("frozen")

    measured = reported(result)
    assert measured["num_services"] == 1
    assert measured["left"] == 0, "at exit, Python would wait for it for ever"
    assert measured["slowest_s"] < 0.05
    assert measured["fit_s"] < 40
    assert series(read_jsonl(run_dir), "train/loss")[0] == list(range(1, 2001))
    assert "Traceback" not in result.stderr
    assert "given up" in result.stderr


def test_a_killed_wandb_core_is_said_once_and_training_goes_on(run_script):
    result, run_dir = run_script("killed")

    measured = reported(result)
    assert measured["num_services"] == 1
    assert measured["slowest_s"] < 0.05
    assert series(read_jsonl(run_dir), "train/loss")[0] == list(range(1, 2001))
    assert "Traceback" not in result.stderr
    assert result.stderr.count("is off for the rest of the run") == 1


def test_the_next_fit_has_a_new_wandb_core(run_script, wandb_history):
    result, run_dir = run_script("killed_then_again")

    assert result.returncode == 0, result.stderr
    steps = [row["global_step"] for row in wandb_history(run_dir) if "train/loss" in row]
    assert {5, 6, 7} <= set(steps)


def test_without_a_key_the_run_is_offline(run_script, wandb_history):
    result, run_dir = run_script("without_key")

    assert result.returncode == 0, result.stderr
    assert "W&B has no key" in result.stderr
    assert [row["global_step"] for row in wandb_history(run_dir) if "train/loss" in row] == [
        1,
        2,
        3,
    ]


def test_a_server_out_of_reach_delays_the_start_by_seconds_and_the_run_is_offline(
    run_script, wandb_history
):
    result, run_dir = run_script("unreachable")

    measured = reported(result)
    assert measured["started_s"] < 5.0 + 6.0, "5 s at most, and the imports of a busy machine"
    assert measured["fit_s"] < 40
    assert "W&B's server isn't reached" in result.stderr
    assert "Traceback" not in result.stderr
    assert [row["global_step"] for row in wandb_history(run_dir) if "train/loss" in row] == [
        1,
        2,
        3,
    ]


def test_the_run_of_the_script_itself_is_used_and_left_open(run_script, wandb_history, tmp_path):
    result, _ = run_script("own_run")

    assert result.returncode == 0, result.stderr
    rows = wandb_history(tmp_path / "runs")
    assert [row.get("global_step", row.get("mine")) for row in rows][-1] == 1.0
    assert [row["global_step"] for row in rows if "train/loss" in row] == [1, 2, 3]


def test_the_mixin_has_the_run_while_it_lasts(run_script, wandb_history):
    result, run_dir = run_script("mixin")

    measured = reported(result)
    assert measured["during"] == json.loads((run_dir / "wandb-run.json").read_text())["id"]
    assert measured["after"] is None
    assert [row["global_step"] for row in wandb_history(run_dir) if "train/loss" in row] == [
        1,
        2,
        3,
    ]


def test_an_error_is_the_exit_code_of_the_run(run_script, read_wandb):
    result, run_dir = run_script("failing")

    assert result.returncode == 1
    assert "no luck" in result.stderr
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    exits = [record.exit.exit_code for record in read_wandb(path) if record.HasField("exit")]
    assert exits == [1]


def test_a_disabled_run_writes_nothing(run_script):
    result, run_dir = run_script("mixin", WANDB_MODE="disabled")

    assert result.returncode == 0, result.stderr
    assert not list(run_dir.glob("wandb/*/*.wandb"))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match='mode=\'on\': "online", "offline", "disabled"'):
        WandBSink(mode="on")  # type: ignore[arg-type]
