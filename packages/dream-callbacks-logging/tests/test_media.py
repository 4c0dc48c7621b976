from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from dream_callbacks.logging import LoggerCallback, MediaLoggerCallback, read_jsonl
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class PictureTrainer(TinyTrainer):
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        number = len(batch[0])
        return super().validation_step(batch, batch_idx) | {
            "pictures": torch.full((number, 3, 4, 5), 0.5),
            "val_clips": torch.rand(number, 6, 1, 4, 5),
            "features": torch.rand(number, 16, 4, 5),
            "labels": [f"batch {batch_idx}, {n}" for n in range(number)],
        }


def run(directory, *callbacks: Any, **training: Any) -> TinyTrainer:
    config = tiny_config(directory, [LoggerCallback(), *callbacks], **training)
    config.debug = True
    trainer = PictureTrainer(config)
    trainer.fit()
    return trainer


def test_tensors_with_the_shape_of_images_or_videos_are_logged_in_each_validation(tmp_path):
    trainer = run(tmp_path, MediaLoggerCallback(max_items=2), n_epochs=2)

    images, videos = (read_jsonl(trainer.run_dir, event) for event in ("images", "videos"))
    assert [(line["step"], line["name"], len(line["files"])) for line in images] == [
        (8, "val/pictures", 2),
        (16, "val/pictures", 2),
    ]
    assert [(line["step"], line["name"], len(line["files"])) for line in videos] == [
        (8, "val_clips", 2),
        (16, "val_clips", 2),
    ]


def test_keys_batches_captions_and_runs_can_be_selected(tmp_path):
    media = MediaLoggerCallback(
        "pictures", batches=(0, 1), captions_key="labels", max_items=1, every_n_validations=2
    )
    trainer = run(tmp_path, media, n_epochs=3)

    lines = read_jsonl(trainer.run_dir, "images")
    assert [(line["step"], line["name"], line["captions"]) for line in lines] == [
        (step, f"val/pictures/batch_{batch}", [f"batch {batch}, 0"])
        for step in (8, 24)
        for batch in (0, 1)
    ]
    assert not read_jsonl(trainer.run_dir, "videos")


def test_value_range_maps_to_black_and_white(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    media = MediaLoggerCallback("pictures", value_range=(0.0, 0.5), max_items=1)
    trainer = run(tmp_path, media)

    (line,) = read_jsonl(trainer.run_dir, "images")
    with image_module.open(trainer.run_dir / line["files"][0]) as picture:
        assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_a_missing_key_warns_once_and_does_not_end_the_run(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = run(tmp_path, MediaLoggerCallback(["pictures", "nothing"]), n_epochs=2)

    assert caplog.text.count("keys includes nothing, but validation_step returned") == 1
    assert len(read_jsonl(trainer.run_dir, "images")) == 2


def test_a_sanity_validation_logs_no_images(tmp_path):
    trainer = run(tmp_path, MediaLoggerCallback(), num_sanity_val_steps=2, max_steps=8)

    assert [line["step"] for line in read_jsonl(trainer.run_dir, "images")] == [8]


def on_ranks(directory):
    trainer = run(directory, MediaLoggerCallback(max_items=1))
    return len(read_jsonl(trainer.run_dir, "images"))


def test_on_two_ranks_only_rank_zero_logs(tmp_path):
    first, _ = run_on_ranks(on_ranks, 2, tmp_path)

    assert first == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_items": 0}, "max_items=0"),
        ({"every_n_validations": 0}, "every_n_validations=0"),
        ({"fps": 0}, "fps=0"),
        ({"value_range": (1.0, 1.0)}, "value_range="),
    ],
    ids=str,
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        MediaLoggerCallback(**arguments)
