"""Names and directory of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dream_trainer import DreamTrainerConfig
from dream_trainer.callbacks import Callback
from dream_trainer.testing import TinyTrainer, tiny_config


def test_the_run_directory_consists_of_the_names(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.project, config.group, config.experiment = "p", "g", "e"

    assert TinyTrainer(config).run_dir == tmp_path / "p" / "g" / "e"
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "name", ["..", ".", "", " ", "a/b", "/etc", "a\\b", "a\0b", "a\nb", "x" * 300, "é" * 150]
)
def test_names_that_would_leave_the_run_directory_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"experiment=.* can't name a folder"):
        DreamTrainerConfig(experiment=name)


@pytest.mark.parametrize("field", ["project", "group", "experiment"])
def test_an_invalid_name_assigned_later_is_refused(tmp_path: Path, field: str) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path))
    setattr(trainer.config, field, "../../elsewhere")

    for name in (field, "run_dir"):
        with pytest.raises(ValueError, match=rf"{field}='../../elsewhere' can't name a folder"):
            getattr(trainer, name)


@pytest.mark.parametrize("name", ["run 1", "größe", "..a", "v1.2-β"])
def test_ordinary_and_unicode_names_are_accepted(name: str) -> None:
    assert DreamTrainerConfig(experiment=name).experiment == name


@pytest.mark.parametrize("url", ["s3://bucket/runs", Path("s3://bucket/runs"), "file:///runs"])
def test_a_url_is_refused_as_root_dir(url: str | Path) -> None:
    with pytest.raises(ValueError, match=r"root_dir='\w+:/.*' is a URL; a directory is required"):
        DreamTrainerConfig(root_dir=url)


@pytest.mark.parametrize("path", ["runs", "/data/a:b", "C:/runs", Path("x") / "s3:"])
def test_any_directory_is_accepted_as_root_dir(path: str | Path) -> None:
    assert DreamTrainerConfig(root_dir=path).root_dir == path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"callbacks": Callback()}, r"a list is required, not a Callback; write callbacks=\[…\]"),
        ({"training_parameters": {"n_epochs": 2}}, "a TrainingParameters is required, not a dict"),
        ({"device_parameters": "cpu"}, "a DeviceParameters is required, not a str"),
    ],
    ids=["callback", "dict", "str"],
)
def test_a_field_of_the_wrong_type_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DreamTrainerConfig(**fields)


@pytest.mark.parametrize("config", [DreamTrainerConfig, {}, None], ids=str)
def test_an_object_that_is_not_a_config_is_refused(config: Any) -> None:
    with pytest.raises(TypeError, match=r"TinyTrainer was given .*; an instance of a config is"):
        TinyTrainer(config)


def test_everything_has_a_default() -> None:
    config = DreamTrainerConfig()

    assert config.project == "dream-trainer"
    assert len(config.callbacks) == 0
