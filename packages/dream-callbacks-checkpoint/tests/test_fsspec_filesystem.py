"""Checkpoints at a URL: the same guarantees without atomic rename."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training import CrashAt, PlannedError, different, make, moments, weights

from dream_callbacks.checkpoint import CheckpointError, LoadPartialCheckpointCallback
from dream_callbacks.checkpoint.__main__ import main
from dream_callbacks.checkpoint.catalog import filesystem_at, read_catalog
from dream_callbacks.checkpoint.io.filesystem import Filesystem, is_url
from dream_callbacks.checkpoint.io.fsspec_filesystem import FsspecFilesystem
from dream_trainer.callbacks import Every
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of a bucket on an S3 server in this process."""
    server = pytest.importorskip("moto.server", reason="needs moto[server] and s3fs")
    s3fs = pytest.importorskip("s3fs")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
    running.stop()


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    place = f"{uuid.uuid4().hex}/with space/µ"
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{place}"
    return f"memory://{place}" if request.param == "memory" else f"file://{tmp_path}/{place}"


def checkpoints_at(url: str) -> str:
    config = tiny_config()
    return f"{url}/{config.project}/{config.group}/{config.experiment}/checkpoints"


def steps(url: str) -> list[int]:
    return [c.step for c in read_catalog(filesystem_at(checkpoints_at(url))).checkpoints]


def run(url: str, root: Path, *callbacks: Any, callback: str = "sync", **fields: Any) -> Any:
    fields = {"every": Every(steps=2), "keep_last": 2, **fields}
    return make(root, *callbacks, callback=callback, root_dir=url, **fields)


@pytest.mark.parametrize("callback", ["sync", "async"])
def test_a_run_resumes_from_a_url_bit_for_bit(tmp_path: Path, url: str, callback: str) -> None:
    uninterrupted = run(f"{url}/uninterrupted", tmp_path, callback=callback)
    uninterrupted.fit()

    with pytest.raises(PlannedError):
        run(f"{url}/stopped", tmp_path, CrashAt(9), callback=callback).fit()
    resumed = run(f"{url}/stopped", tmp_path, callback=callback)
    resumed.fit()

    assert not different(weights(uninterrupted), weights(resumed))
    assert not different(moments(uninterrupted), moments(resumed))
    assert steps(f"{url}/stopped") == [10, 12]
    filesystem = filesystem_at(checkpoints_at(f"{url}/stopped"))
    assert sorted(filesystem.entries()) == [
        "metrics-0000000012.json",
        "run.lock",
        "step-0000000010",
        "step-0000000012",
    ]


def test_a_folder_without_a_manifest_is_removed(tmp_path: Path, url: str) -> None:
    run(url, tmp_path, every=Every(steps=4)).fit()
    filesystem = filesystem_at(checkpoints_at(url))
    filesystem.unlink("step-0000000012/MANIFEST.json")

    trainer = run(url, tmp_path)
    trainer.setup()

    assert trainer.global_step == 8
    assert sorted(filesystem.entries()) == ["run.lock", "step-0000000008"]


def test_the_manifest_is_written_last(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, str]] = []
    create = FsspecFilesystem.create

    def noted(self: FsspecFilesystem, folder: str, name: str) -> Any:
        written.append((folder, name))
        return create(self, folder, name)

    monkeypatch.setattr(FsspecFilesystem, "create", noted)
    run(url, tmp_path, every=Every(steps=4)).fit()

    for folder in {folder for folder, _ in written if folder}:
        assert [name for each, name in written if each == folder][-1] == "MANIFEST.json"


def test_damage_is_detected(tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    run(url, tmp_path).fit()
    filesystem = filesystem_at(checkpoints_at(url))
    data = bytearray(filesystem.read("step-0000000012", "__0_0.distcp"))
    data[len(data) // 2] ^= 1
    filesystem.write("step-0000000012", "__0_0.distcp", bytes(data))

    trainer = run(url, tmp_path)
    trainer.setup()

    assert trainer.global_step == 10
    assert "step-0000000012/__0_0.distcp: its checksum doesn't match" in caplog.text


def test_the_next_save_of_an_overtaken_run_fails(tmp_path: Path, url: str) -> None:
    class TakenOver(CrashAt):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if self.trainer.local_batches == self.batch:
                run(url, tmp_path).setup()

    first = run(url, tmp_path, TakenOver(5), on_save_error="raise")

    with pytest.raises(CheckpointError, match="another run has taken over"):
        first.fit()

    assert steps(url) == [2, 4]


def test_two_ranks_save_to_a_url_and_one_resumes(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    run_on_ranks(fit_on_two, 2, url, tmp_path)

    trainer = run(url, tmp_path, training={"n_epochs": 3})
    trainer.setup()

    assert trainer.global_step == 12
    (checkpoint,) = [c for c in catalog(url).checkpoints if c.step == 12]
    assert checkpoint.manifest.world_size == 2
    assert {"rank-00000.json", "rank-00001.json"} <= set(checkpoint.manifest.files)


def fit_on_two(url: str, root: Path) -> None:
    run(url, root, layout="fsdp").fit()


def catalog(url: str) -> Any:
    return read_catalog(filesystem_at(checkpoints_at(url)))


def test_weights_are_loaded_from_a_url(tmp_path: Path, url: str) -> None:
    source = run(url, tmp_path, kind=TinyTrainer)
    source.fit()
    load = LoadPartialCheckpointCallback(checkpoints_at(url))

    trainer = TinyTrainer(tiny_config(tmp_path / "new", [load]))
    trainer.setup()

    assert not different(weights(source), weights(trainer))
    assert load.report is not None
    assert str(load.report.checkpoint).endswith("checkpoints/step-0000000016")


def test_the_commands_take_urls(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(url, tmp_path, kind=TinyTrainer).fit()
    above = checkpoints_at(url).removesuffix("/checkpoints")

    assert main(["ls", above]) == 0
    assert main(["verify", checkpoints_at(url)]) == 0
    assert main(["show", f"{checkpoints_at(url)}/step-0000000014"]) == 0
    assert main(["export", above, str(tmp_path / "model.pt")]) == 0
    assert main(["prune", above, "--keep-last", "1", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "step-0000000016  intact" in text
    assert "would delete 1 of 2" in text

    assert main(["prune", above, "--keep-last", "1"]) == 1
    assert "it is unknown whether a run still saves to" in capsys.readouterr().err
    assert main(["ls", f"{url}/elsewhere"]) == 1
    assert "there are no checkpoints in" in capsys.readouterr().err


def test_without_fsspec_a_url_is_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)

    with pytest.raises(ImportError, match=r"pip install 'dream-callbacks-checkpoint\[fsspec\]'"):
        filesystem_at("memory://runs")


@pytest.mark.parametrize("path", ["s3://bucket/runs", "gs://bucket", "memory://x", "file:/x"])
def test_urls_are_recognized(path: str) -> None:
    assert is_url(path)


@pytest.mark.parametrize("path", ["runs", "/a b/ü", "C:\\runs", "C:/runs", "a:b", "../x"])
def test_paths_are_not_urls(path: str) -> None:
    assert not is_url(path)


def test_a_url_mangled_by_pathlib_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'s3:/bucket/runs' has one slash .* URL as text"):
        filesystem_at(Path("s3://bucket/runs"))


def test_both_file_systems_behave_the_same(tmp_path: Path, url: str) -> None:
    def use(filesystem: Filesystem) -> list[Any]:
        filesystem.make_root()
        filesystem.make("a")
        sums = filesystem.write("a", "x", b"one")
        filesystem.write("a", "MANIFEST.json", b"{}")
        filesystem.rename("a", "b")
        filesystem.replace("note", b"two", "0")
        found = [
            sorted(filesystem.entries()),
            sorted(filesystem.entries("b")),
            filesystem.size("b", "x"),
            sums,
        ]
        found += [
            filesystem.is_folder("a"),
            filesystem.is_folder("b"),
            filesystem.size("a", "x"),
            filesystem.sums("b", "x"),
        ]
        filesystem.unlink("note")
        filesystem.unlink("note")
        filesystem.delete("b")
        filesystem.delete("b")
        return [
            *found,
            filesystem.entries(),
            filesystem.read("", "note") if filesystem.size("", "note") else None,
        ]

    assert use(filesystem_at(url)) == use(filesystem_at(tmp_path / "local"))
