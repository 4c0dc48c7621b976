from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dream_callbacks.logging import (
    Histogram,
    JSONLinesSink,
    LoggedRun,
    LoggerCallback,
    OpenedSink,
    TensorBoardSink,
)
from dream_trainer.testing import TinyTrainer, tiny_config

pytest.importorskip("tensorboard")
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

_KILLED = """
import os, signal, sys, time
from pathlib import Path
from dream_callbacks.logging import LoggedRun, TensorBoardSink
run = LoggedRun(project="p", group="g", experiment="e", run_dir=Path(sys.argv[1]))
sink = TensorBoardSink().open(run)
for step in range(500):
    sink.log_scalars({"loss": 1.0}, step)
time.sleep(2.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


def opened(tmp_path: Path, step: int = 0) -> OpenedSink:
    run = LoggedRun(project="p", group="g", experiment="e", run_dir=tmp_path, step=step)
    return TensorBoardSink().open(run)


def read(tmp_path: Path):
    events = event_accumulator.EventAccumulator(
        str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0}
    )
    return events.Reload()


def test_scalars_are_read_back_by_tensorboard(tmp_path):
    sink = opened(tmp_path)
    for step in (1, 2, 3):
        sink.log_scalars({"train/loss": 1.0 / step, "odd": object()}, step)  # type: ignore[dict-item]
    sink.close()

    scalars = read(tmp_path).Scalars("train/loss")
    assert [(event.step, event.value) for event in scalars] == [
        (step, pytest.approx(1.0 / step)) for step in (1, 2, 3)
    ]


def test_a_resumed_run_hides_the_repeated_steps(tmp_path):
    sink = opened(tmp_path)
    for step in range(1, 8):
        sink.log_scalars({"loss": float(step)}, step)
    sink.close()
    sink = opened(tmp_path, step=4)
    for step in range(5, 10):
        sink.log_scalars({"loss": step + 0.5}, step)
    sink.close()

    scalars = read(tmp_path).Scalars("loss")
    assert [event.step for event in scalars] == list(range(1, 10))
    assert [event.value for event in scalars] == [1, 2, 3, 4, 5.5, 6.5, 7.5, 8.5, 9.5]


def test_images_videos_and_plots_are_tensorboard_images(tmp_path):
    class Figure:
        def savefig(self, file, **options):
            from dream_callbacks.logging.png import Frame

            file.write(Frame(7, 3, 1, bytes(21)).png)

    sink = opened(tmp_path)
    sink.log_images("pictures", torch.rand(2, 3, 4, 5), 1, captions=["a", "b"])
    sink.log_videos("clip", torch.rand(1, 6, 3, 4, 5), 1)
    sink.log_plot("curve", Figure(), 1)
    sink.close()

    events = read(tmp_path)
    images = {tag: events.Images(tag)[0] for tag in events.Tags()["images"]}
    assert {tag: (image.width, image.height) for tag, image in images.items()} == {
        "pictures/0": (5, 4),
        "pictures/1": (5, 4),
        "clip/0": (5, 4),
        "curve": (7, 3),
    }
    assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in images.values())
    assert b"acTL" in images["clip/0"].encoded_image_string


def test_histograms_are_read_back(tmp_path):
    sink = opened(tmp_path)
    histogram = Histogram(counts=[1.0, 2.0], edges=[0.0, 0.5, 1.0], total=2, total_of_squares=1.5)
    sink.log_histogram("weights", histogram, 4)
    sink.close()

    (event,) = read(tmp_path).Histograms("weights")
    value = event.histogram_value
    assert (event.step, value.num, list(value.bucket)) == (4, 3.0, [1.0, 2.0])


def test_config_and_code_are_texts(tmp_path):
    (tmp_path / "train.py").write_text("x")
    sink = opened(tmp_path / "run")
    sink.log_config({"lr": float("nan"), "inner": {"size": 3}})
    sink.log_code(tmp_path)
    sink.close()

    events = read(tmp_path / "run")
    texts = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    assert '"size": 3' in texts["config/text_summary"]
    assert "train.py" in texts["code/text_summary"]


def test_a_killed_process_loses_at_most_the_last_seconds(tmp_path):
    subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], check=False)

    assert len(read(tmp_path).Scalars("loss")) == 500


def test_two_fits_write_one_history(tmp_path):
    logger = LoggerCallback(1, sinks=[JSONLinesSink(), TensorBoardSink()])
    trainer = TinyTrainer(tiny_config(tmp_path, [logger], max_steps=3))
    trainer.fit()
    trainer.config.training_parameters.max_steps = 6
    trainer.fit()

    scalars = read(trainer.run_dir).Scalars("train/loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5, 6]
