from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dream_callbacks.logging import (
    JSONLinesSink,
    LoggerCallback,
    WandBLoggerMixin,
    WandBSink,
    read_jsonl,
    series,
)
from dream_callbacks.logging.open_sinks import planned_sinks
from dream_callbacks.logging.sinks.wandb import has_api_key
from dream_callbacks.logging.sinks.wandb_service import running_services
from dream_trainer import callbacks
from dream_trainer.callbacks import Callback
from dream_trainer.configs import LoggingParameters, WandbLoggingParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.trainer import mixins

pytest.importorskip("wandb")


class MixinTrainer(TinyTrainer, WandBLoggerMixin):
    pass


class AtStep(Callback[Any]):
    """Calls a function with the trainer at a step."""

    def __init__(self, step: int, function: Callable[[Any], Any]) -> None:
        self.step = step
        self.function = function

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self.trainer.global_step == self.step:
            self.function(self.trainer)


def logger(mode: Any = "offline") -> LoggerCallback:
    return LoggerCallback(1, sinks=[JSONLinesSink(), WandBSink(mode)])


def run_dir_in(directory: Path) -> Path:
    (found,) = directory.glob("*/*/*/log.jsonl")
    return found.parent


def logged_steps(rows: list[dict[str, Any]]) -> list[int]:
    return [row["global_step"] for row in rows if "train/loss" in row]


@pytest.fixture
def run_forked(tmp_path, wandb_environment):
    """Runs a function in a forked process; returns its result, the directory and the log."""

    def run(function: Callable[..., Any]) -> tuple[Any, Path, str]:
        directory = tmp_path / "runs"
        directory.mkdir(exist_ok=True)
        ((returned, text),) = run_on_ranks(_forked, 1, function, directory, wandb_environment)
        return returned, directory, text

    return run


def _forked(
    function: Callable[..., Any], directory: Path, environment: dict[str, str]
) -> tuple[Any, str]:
    for name in set(os.environ) - set(environment):
        if name.startswith("WANDB_"):
            del os.environ[name]
    os.environ.update(
        {k: v for k, v in environment.items() if "WANDB" in k or k in ("HOME", "NETRC")}
    )
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]  # shorter than a subclass
    logging.getLogger("dream_callbacks.logging").addHandler(handler)
    return function(directory), "\n".join(messages)


@pytest.fixture
def run_script(tmp_path, wandb_environment):
    """Runs a function of wandb_runs.py as a script, including its exit; returns the process and
    the run directory."""

    def run(name: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        directory = tmp_path / "runs"
        directory.mkdir(exist_ok=True)
        script = Path(__file__).with_name("wandb_runs.py")
        result = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", str(script), name, str(directory)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=wandb_environment,
            timeout=100,
            check=False,
        )
        return result, directory / "dream-trainer" / "default" / "wandb_runs"

    return run


def reported(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_an_offline_run_contains_everything_that_was_logged(run_script, read_wandb, wandb_history):
    result, run_dir = run_script("offline")

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    rows = wandb_history(run_dir)
    by_step = {row["global_step"]: row for row in rows if "train/loss" in row}
    steps, losses = series(read_jsonl(run_dir), "train/loss")
    assert list(by_step) == steps == list(range(1, 9))
    assert [row["train/loss"] for row in by_step.values()] == losses
    assert by_step[3]["lr"] == 0.01, "one row for each step, from all callbacks"
    assert by_step[8]["gradients/model.embed.weight/_type"] == "histogram"
    last = {name: value for row in rows for name, value in row.items()}
    assert last["val/pictures/count"] == 2
    assert last["val/clips/_type"] == "videos"
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


def train_and_keep_the_third_step(directory: Path) -> None:
    states: list[Any] = []
    keep = AtStep(3, lambda trainer: states.append(trainer.state_dict()))
    TinyTrainer(tiny_config(directory, [logger(), keep], max_steps=5)).fit()
    resumed = TinyTrainer(tiny_config(directory, [logger()], max_steps=8))
    resumed.setup()
    resumed.load_state_dict(states[0])
    resumed.fit()


def test_a_resumed_run_keeps_its_id(run_forked, wandb_history):
    _, directory, _ = run_forked(train_and_keep_the_third_step)

    run_dir = run_dir_in(directory)
    ids = [path.stem for path in run_dir.glob("wandb/offline-run-*/*.wandb")]
    own_id = json.loads((run_dir / "wandb-run.json").read_text())["id"]
    assert ids == [f"run-{own_id}"] * 2
    assert sorted(logged_steps(wandb_history(run_dir))) == [1, 2, 3, 4, 4, 5, 5, 6, 7, 8]
    assert series(read_jsonl(run_dir), "train/loss")[0] == list(range(1, 9))


def train_twice_from_the_start(directory: Path) -> None:
    for _ in range(2):
        TinyTrainer(tiny_config(directory, [logger()], max_steps=2)).fit()


def test_a_run_that_restarts_from_the_beginning_gets_a_new_id(run_forked):
    _, directory, _ = run_forked(train_twice_from_the_start)

    assert len({path.stem for path in directory.glob("**/*.wandb")}) == 2


def test_a_frozen_wandb_core_does_not_slow_training_and_the_end_is_bounded(run_script):
    result, run_dir = run_script("frozen")

    measured = reported(result)
    assert measured["num_services"] == 1
    assert measured["left"] == 0, "at exit, Python would wait for it forever"
    assert measured["median_s"] < 0.001
    assert measured["p99_s"] < 0.01, "0.3 ms, if nothing else keeps the machine busy"
    assert measured["fit_s"] < 40
    assert series(read_jsonl(run_dir), "train/loss")[0] == list(range(1, 2001))
    assert "Traceback" not in result.stderr
    assert "was abandoned" in result.stderr


def test_a_killed_wandb_core_is_reported_once_and_training_continues(run_script):
    result, run_dir = run_script("killed")

    measured = reported(result)
    assert measured["num_services"] == 1
    assert measured["median_s"] < 0.001
    assert measured["p99_s"] < 0.01, "0.3 ms, if nothing else keeps the machine busy"
    assert series(read_jsonl(run_dir), "train/loss")[0] == list(range(1, 2001))
    assert "Traceback" not in result.stderr
    assert result.stderr.count("is disabled for the rest of the run") == 1


def key_in_netrc(directory: Path) -> list[bool]:
    import wandb

    settings = wandb.setup().settings
    before = has_api_key(wandb)
    machine = settings.base_url.partition("//")[2]
    path = Path(os.environ["NETRC"])
    path.write_text(f"machine {machine} login user password {'0' * 40}\n")
    path.chmod(0o600)
    return [before, has_api_key(wandb)]


def test_an_api_key_of_an_earlier_login_is_found(run_forked):
    found, _, _ = run_forked(key_in_netrc)

    assert found == [False, True]


def train_again_after_wandb_core_was_killed(directory: Path) -> None:
    def kill(trainer: Any) -> None:
        for pid in running_services():
            os.kill(pid, signal.SIGKILL)

    trainer = TinyTrainer(tiny_config(directory, [logger(), AtStep(2, kill)], max_steps=4))
    trainer.fit()
    trainer.config.training_parameters.max_steps = 7
    trainer.fit()


def test_the_next_fit_starts_a_new_wandb_core(run_forked, wandb_history):
    _, directory, _ = run_forked(train_again_after_wandb_core_was_killed)

    assert {5, 6, 7} <= set(logged_steps(wandb_history(run_dir_in(directory))))


def train_online(directory: Path) -> None:
    TinyTrainer(tiny_config(directory, [logger("online")], max_steps=3)).fit()


def test_without_an_api_key_the_run_is_offline(run_forked, wandb_history):
    _, directory, log = run_forked(train_online)

    assert "W&B has no API key, so the run is logged offline" in log
    assert logged_steps(wandb_history(run_dir_in(directory))) == [1, 2, 3]


def test_an_unreachable_server_delays_the_start_by_seconds_and_the_run_is_offline(
    run_script, wandb_history
):
    result, run_dir = run_script("unreachable")

    measured = reported(result)
    assert measured["started_s"] < 5.0 + 6.0, "at most 5 s, plus imports on a busy machine"
    assert measured["fit_s"] < 40
    own_id = json.loads((run_dir / "wandb-run.json").read_text())["id"]
    assert {path.stem for path in run_dir.glob("wandb/*/*.wandb")} == {f"run-{own_id}"}
    assert "the W&B server can't be reached" in result.stderr
    assert "Traceback" not in result.stderr
    assert logged_steps(wandb_history(run_dir)) == [
        1,
        2,
        3,
    ]


def train_within_a_run_of_the_script(directory: Path) -> None:
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(mode="offline", dir=str(directory), settings=settings)
    TinyTrainer(tiny_config(directory, [logger()], max_steps=3)).fit()
    run.log({"mine": 1.0})
    run.finish()


def test_a_run_opened_by_the_script_is_used_and_not_finished(run_forked, wandb_history):
    _, directory, _ = run_forked(train_within_a_run_of_the_script)

    rows = wandb_history(directory)
    assert logged_steps(rows) == [1, 2, 3]
    assert rows[-1]["mine"] == 1.0
    assert not list(directory.glob("*/*/*/wandb"))


def train_with_the_mixin(directory: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    look = AtStep(1, lambda trainer: seen.update(during=trainer.wandb_run.id))
    os.environ["WANDB_MODE"] = "offline"
    trainer = MixinTrainer(tiny_config(directory, [LoggerCallback(1), look], max_steps=3))
    trainer.fit()
    return seen | {"after": trainer.wandb_run}


def test_the_mixin_exposes_the_run_during_fit(run_forked, wandb_history):
    seen, directory, _ = run_forked(train_with_the_mixin)

    run_dir = run_dir_in(directory)
    own_id = json.loads((run_dir / "wandb-run.json").read_text())["id"]
    assert seen == {"during": own_id, "after": None}
    assert logged_steps(wandb_history(run_dir)) == [1, 2, 3]


def train_into_an_error(directory: Path) -> None:
    def fail(trainer: Any) -> None:
        raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        TinyTrainer(tiny_config(directory, [logger(), AtStep(2, fail)])).fit()


def test_an_error_is_the_exit_code_of_the_run(run_forked, read_wandb):
    _, directory, _ = run_forked(train_into_an_error)

    run_dir = run_dir_in(directory)
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    exits = [record.exit.exit_code for record in read_wandb(path) if record.HasField("exit")]
    assert exits == [1]
    assert read_jsonl(run_dir, "end")[0]["error"] == "ValueError: no luck"


@pytest.mark.parametrize(
    ("trainer_class", "parameters", "expected"),
    [
        (TinyTrainer, LoggingParameters(), [JSONLinesSink]),
        (TinyTrainer, WandbLoggingParameters(), [JSONLinesSink, WandBSink]),
        (TinyTrainer, WandbLoggingParameters(enabled=False), [JSONLinesSink]),
        (MixinTrainer, LoggingParameters(), [JSONLinesSink, WandBSink]),
        (MixinTrainer, WandbLoggingParameters(enabled=False), [JSONLinesSink]),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_the_config_and_the_trainer_select_the_sinks(trainer_class, parameters, expected):
    config = tiny_config()
    config.logging_parameters = parameters

    sinks = planned_sinks(None, trainer_class(config))

    assert [type(sink) for sink in sinks] == expected


def test_the_mixin_warns_once_that_no_sink_is_open(tmp_path, caplog):
    trainer = MixinTrainer(tiny_config(tmp_path))
    trainer.log_scalar("loss", 1.0)
    trainer.log_dict({"loss": 1.0})

    assert caplog.text.count("add a LoggerCallback to its callbacks") == 1


def test_core_names_resolve_to_this_package():
    assert callbacks.WandBSink is WandBSink
    assert mixins.WandBLoggerMixin is WandBLoggerMixin


class GuideCallback(Callback[mixins.EvalMetricMixin & mixins.WandBLoggerMixin]):
    """As in the guide: requires two mixins."""


def test_a_callback_may_require_the_mixin(tmp_path):
    MixinTrainer(tiny_config(tmp_path, [GuideCallback()]))
    with pytest.raises(TypeError, match="needs a trainer with WandBLoggerMixin"):
        TinyTrainer(tiny_config(tmp_path, [GuideCallback()]))


def train_disabled(directory: Path) -> None:
    os.environ["WANDB_MODE"] = "disabled"
    TinyTrainer(tiny_config(directory, [logger(None)], max_steps=3)).fit()


def test_a_disabled_run_writes_nothing_for_wandb(run_forked):
    _, directory, log = run_forked(train_disabled)

    assert not list(directory.glob("**/*.wandb"))
    assert log == ""


def test_an_unknown_mode_is_rejected():
    with pytest.raises(ValueError, match='mode=\'on\': "online", "offline", "disabled"'):
        WandBSink(mode="on")  # type: ignore[arg-type]
