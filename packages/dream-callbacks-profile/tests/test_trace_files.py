"""Traces are complete files and open in TensorBoard's real profiler plugin."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from torch.profiler import profile

from dream_callbacks.profile import ProfileCallback
from dream_callbacks.profile.trace_files import write_trace
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("torch_tb_profiler") is None,
    reason="the extra `view` (tensorboard, torch-tb-profiler) isn't installed",
)


def _fit(root_dir: str) -> str:
    callback = ProfileCallback(
        skip_first=0, warmup=1, active=2, ranks=None, record_shapes=True, profile_memory=True
    )
    trainer = TinyTrainer(tiny_config(root_dir, [callback]))
    trainer.fit()
    return str(trainer.run_dir)


@contextmanager
def _tensorboard(logdir: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--load_fast=false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Its plugin of this age asks Python for things that newer ones warn about.
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    try:
        yield f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler/"
    finally:
        process.terminate()
        process.wait(20)


def _get(url: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{url}?{urlencode(query)}" if query else url, timeout=20) as reply:
        return json.load(reply)


def _loaded_runs(plugin: str, deadline_s: float) -> list[str]:
    while time.monotonic() < deadline_s:
        try:
            reply = _get(f"{plugin}runs")
        except (urllib.error.URLError, ConnectionError):
            reply = {"runs": [], "loading": True}
        if reply["runs"] and not reply["loading"]:
            runs: list[str] = reply["runs"]
            return runs
        time.sleep(0.2)
    raise TimeoutError("TensorBoard hasn't loaded a run")


@needs_tensorboard
def test_tensorboard_shows_the_traces_of_both_ranks(tmp_path):
    run_dir = run_on_ranks(_fit, 2, str(tmp_path))[0]

    with _tensorboard(run_dir) as plugin:
        (run,) = _loaded_runs(plugin, time.monotonic() + 60)
        views = _get(f"{plugin}views", run=run)
        workers = _get(f"{plugin}workers", run=run, view="Overview")
        (span,) = _get(f"{plugin}spans", run=run, worker="rank0") or [""]
        overview = _get(f"{plugin}overview", run=run, worker="rank0", span=span)
        operators = _get(
            f"{plugin}operation/table", run=run, worker="rank0", span=span, group_by="Operation"
        )
        overlap = _get(f"{plugin}distributed/overlap", run=run, worker="All", span=span)

    assert run == "profile"
    assert {"Overview", "Operator", "Trace", "Distributed"} <= set(views)
    assert workers == ["rank0", "rank1"]
    assert len(overview["steps"]["rows"]) == 2
    assert "aten::addmm" in {row["name"] for row in operators["data"]}
    assert overlap["data"]


def test_a_trace_is_never_seen_half_written(tmp_path):
    profiler = profile(with_stack=True, record_shapes=True)
    profiler.start()
    for _ in range(2000):
        torch.ones(4).sin().cos()
    profiler.stop()
    seen: list[int] = []
    is_done = threading.Event()

    def look() -> None:
        while not (is_done.is_set() and seen):
            # The ending is what the plugin looks for.
            texts = [gzip.decompress(path.read_bytes()) for path in tmp_path.glob("*.json.gz")]
            seen.extend(len(json.loads(text)["traceEvents"]) for text in texts)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        path = write_trace(profiler, tmp_path, rank=3)
        is_done.set()
        looking.result(timeout=30)

    assert len(set(seen)) == 1
    assert seen[0] > 4000
    assert list(tmp_path.iterdir()) == [path]
