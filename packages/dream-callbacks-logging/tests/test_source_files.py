from __future__ import annotations

import io
import os
import time
import zipfile

from dream_callbacks.logging.source_files import source_files


def test_code_and_config_are_selected_but_not_environments_or_runs(tmp_path):
    wanted = ["a.py", "configs/b.yaml", "pkg/c.toml", "Dockerfile"]
    unwanted = [
        ".git/config.py",
        "__pycache__/x.py",
        "node_modules/x.json",
        "env/pyvenv.cfg",
        "env/lib/x.py",
        "out/log.py",
        "weights.bin",
        "notes.txt",
    ]
    for name in [*wanted, *unwanted]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")

    found = source_files(tmp_path, leave_out=tmp_path / "out")

    assert found.paths == tuple(sorted(wanted))
    assert found.too_large == ()


def test_large_files_are_reported_and_left_out(tmp_path):
    (tmp_path / "data.json").write_bytes(b"0" * 1_000_001)
    (tmp_path / "a.py").write_text("x")

    found = source_files(tmp_path)

    assert (found.paths, found.too_large) == (("a.py",), ("data.json",))


def test_the_total_size_is_limited(tmp_path):
    for index in range(25):
        (tmp_path / f"{index:02}.py").write_bytes(b"#" * 900_000)

    found = source_files(tmp_path)

    assert len(found.paths) == 22
    assert len(found.too_large) == 3


def test_equal_files_give_equal_archives(tmp_path):
    (tmp_path / "a.py").write_text("x")
    first = source_files(tmp_path).archive()
    later = time.time() + 1000
    os.utime(tmp_path / "a.py", (later, later))

    assert source_files(tmp_path).archive() == first
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        assert archive.namelist() == ["a.py"]


def test_a_file_deleted_while_archiving_is_left_out(tmp_path):
    (tmp_path / "a.py").write_text("x")
    (tmp_path / "b.py").write_text("x")
    found = source_files(tmp_path)
    (tmp_path / "a.py").unlink()

    with zipfile.ZipFile(io.BytesIO(found.archive())) as archive:
        assert archive.namelist() == ["b.py"]
