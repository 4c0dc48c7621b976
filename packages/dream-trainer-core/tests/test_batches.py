"""BatchStream: epochs, positions, errors."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.trainer import loader_watch
from dream_trainer.trainer.batches import BatchStream, length_of
from dream_trainer.trainer.evaluation_sets import evaluation_sets, rounds
from dream_trainer.trainer.loader_watch import LoaderWatch
from dream_trainer.world import World


class Letters:
    """Two batches per pass, without a length."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter("ab")


def test_a_loader_with_a_length_restarts_with_each_epoch() -> None:
    stream = BatchStream([1, 2, 3], "training")
    seen = []
    for epoch in range(2):
        stream.start_epoch(epoch)
        seen += [stream.next_batch(), stream.next_batch()]

    assert seen == [1, 2, 1, 2]


def test_a_loader_without_a_length_continues() -> None:
    stream = BatchStream(Letters(), "training")
    seen = []
    for epoch in range(3):
        stream.start_epoch(epoch)
        seen += [stream.next_batch(), stream.next_batch(), stream.next_batch()]
        stream.finish_epoch()

    assert "".join(seen) == "ababababa"


def test_set_epoch_is_called_on_the_sampler() -> None:
    sampler = DistributedSampler(list(range(8)), num_replicas=2, rank=0, shuffle=True)
    stream = BatchStream(DataLoader(list(range(8)), sampler=sampler), "training")

    orders = []
    for epoch in range(2):
        stream.start_epoch(epoch)
        orders.append([stream.next_batch().item() for _ in range(4)])

    assert sampler.epoch == 1
    assert orders[0] != orders[1]


def test_persistent_workers_draw_no_random_number_in_their_first_epoch() -> None:
    def order_of_second_epoch(*, is_first_of_loader: bool) -> list[int]:
        loader = DataLoader(range(8), shuffle=True, num_workers=1, persistent_workers=True)
        stream = BatchStream(loader, "training")
        if not is_first_of_loader:
            stream.start_epoch(0)
            stream.finish_epoch()
        torch.manual_seed(1)
        stream.start_epoch(1)
        return [stream.next_batch().item() for _ in range(8)]

    assert order_of_second_epoch(is_first_of_loader=True) == order_of_second_epoch(
        is_first_of_loader=False
    )


def test_a_stateful_loader_gets_the_epoch_before_its_position() -> None:
    class Stateful(list[int]):
        calls: list[tuple[str, Any]] = []

        def set_epoch(self, epoch: int) -> None:
            self.calls.append(("epoch", epoch))

        def state_dict(self) -> dict[str, Any]:
            return {"at": 1}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.calls.append(("position", state_dict["at"]))

    stream = BatchStream(Stateful([1, 2, 3]), "training")
    stream.start_epoch(3)
    stream.next_batch()
    state = stream.state_dict()
    Stateful.calls.clear()

    BatchStream(Stateful([1, 2, 3]), "training").load_state_dict(state)

    assert Stateful.calls == [("epoch", 3), ("position", 1)]


def test_a_loader_that_ends_before_its_length_is_refused() -> None:
    class Lies(list[int]):
        def __len__(self) -> int:
            return 5

    stream = BatchStream(Lies([1, 2]), "training")
    stream.start_epoch(0)
    stream.next_batch()
    stream.next_batch()
    with pytest.raises(RuntimeError, match="has length 5 and ended after 2 batches"):
        stream.next_batch()


def test_an_iterator_that_cannot_restart_is_refused_at_its_end() -> None:
    stream = BatchStream(iter([1, 2]), "training")
    stream.start_epoch(0)
    assert [stream.next_batch(), stream.next_batch()] == [1, 2]
    with pytest.raises(
        RuntimeError, match="ended after 2 batches and gives none when it is restarted"
    ):
        stream.next_batch()


def test_a_position_is_continued_with_the_same_order() -> None:
    def loader() -> Any:
        return DataLoader(list(range(10)), shuffle=True)

    torch.manual_seed(0)
    straight = BatchStream(loader(), "training")
    straight.start_epoch(0)
    first = [straight.next_batch().item() for _ in range(4)]
    position = straight.state_dict()
    rest = [straight.next_batch().item() for _ in range(6)]

    torch.manual_seed(123)
    resumed = BatchStream(loader(), "training")
    resumed.load_state_dict(position)
    resumed.resume_epoch(0, 4)
    assert [resumed.next_batch().item() for _ in range(6)] == rest
    assert sorted(first + rest) == list(range(10))


def test_a_stateful_loader_loads_its_position() -> None:
    class Stateful:
        def __init__(self) -> None:
            self.next = 0
            self.started = 0

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Any:
            self.started += 1
            while self.next < 4:
                self.next += 1
                yield self.next
            self.next = 0

        def state_dict(self) -> dict[str, Any]:
            return {"next": self.next}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.next = state_dict["next"]

    stream = BatchStream(Stateful(), "training")
    stream.start_epoch(0)
    assert [stream.next_batch(), stream.next_batch()] == [1, 2]

    resumed = BatchStream(Stateful(), "training")
    resumed.load_state_dict(stream.state_dict())
    assert [resumed.next_batch(), resumed.next_batch()] == [3, 4]


def test_pausing_ends_worker_processes_and_loses_no_batch() -> None:
    import multiprocessing

    stream = BatchStream(DataLoader(list(range(6)), num_workers=2), "training")
    stream.start_epoch(0)
    first = stream.next_batch().item()
    assert multiprocessing.active_children()

    stream.pause()
    assert not multiprocessing.active_children()
    stream.resume_epoch(0, 1)
    rest = [stream.next_batch().item() for _ in range(5)]
    stream.finish_epoch()
    assert [first, *rest] == list(range(6))


def test_length_of_a_loader_over_an_iterable_data_set_is_unknown() -> None:
    class Endless(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(int, 1)

    assert length_of(DataLoader(Endless())) is None
    assert length_of([1, 2]) == 2
    assert length_of(iter([1])) is None


class Slow:
    """Waits before a batch."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(4):
            if index == 2:
                time.sleep(0.8)
            yield torch.tensor(index)


def validation_batches(loader: Any, watch: LoaderWatch) -> Iterator[Any]:
    world = World(DeviceParameters(device="cpu"))
    (only,) = evaluation_sets(loader, "validation", world)
    return (now.batch for now in rounds(only, None, world, watch))


@pytest.mark.parametrize("which", ["training", "validation"])
def test_a_batch_that_does_not_arrive_warns(which: str, caplog: pytest.LogCaptureFixture) -> None:
    watch = LoaderWatch(rank=3, patience_s=0.2)
    stream = BatchStream(Slow(), "training", watch)
    began_s = time.monotonic()
    with caplog.at_level(logging.WARNING), watch.watching():
        if which == "training":
            stream.start_epoch(0)
            batches = [int(stream.next_batch()) for _ in range(4)]
        else:
            batches = [int(batch) for batch in validation_batches(Slow(), watch)]

    assert batches == [0, 1, 2, 3]
    took_s = time.monotonic() - began_s
    first = caplog.records[0].getMessage()
    assert f"rank 3 has been waiting for batch 2 of the {which} loader for " in first
    assert "in __iter__ (test_batches.py, line " in first
    assert len(caplog.records) <= math.log2(took_s / 0.2 + 1), "the wait doubles"
    assert "loader-watch" not in {thread.name for thread in threading.enumerate()}


def test_a_slow_loop_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    watch = LoaderWatch(patience_s=0.1)
    stream = BatchStream([1, 2], "training", watch)
    with caplog.at_level(logging.WARNING), watch.watching():
        stream.start_epoch(0)
        stream.next_batch()
        time.sleep(0.4)
        stream.next_batch()

    assert not caplog.records


def test_a_trainer_watches_its_loaders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader_watch, "PATIENCE_S", 0.2)

    class Stuck(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            train, val = super().configure_dataloaders()
            return train, DataLoader(val.dataset, batch_size=8, collate_fn=self.slowly)

        def slowly(self, samples: Any) -> Any:
            time.sleep(0.6)
            return default_collate(samples)

    with caplog.at_level(logging.WARNING):
        Stuck(tiny_config(tmp_path, max_steps=1, num_sanity_val_steps=1)).fit()
    assert "waiting for batch 0 of the validation loader" in caplog.text
    assert "in slowly (test_batches.py" in caplog.text


class Dies(torch.utils.data.Dataset[int]):
    """Its process is killed for a sample."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        if index == 5:
            time.sleep(0.2)  # until the main process waits: SIGCHLD's handler raises at any place
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_the_error_of_a_killed_worker_names_its_batches() -> None:
    stream = BatchStream(DataLoader(Dies(), batch_size=2, num_workers=1), "training")
    stream.start_epoch(7)
    with pytest.raises(RuntimeError, match="DataLoader worker") as raised:
        list(iter(stream.next_batch, None))

    (note,) = raised.value.__notes__
    said = re.fullmatch(
        r"raised in the training loader, at batch (\d) of epoch 7; "
        r"its workers were making the batches up to (\d)",
        note,
    )
    assert said is not None
    assert int(said[1]) <= 2 <= int(said[2]), "index 5 is in batch 2"


class DiesOnTheWay:
    """Its worker dies while it sends a batch, which breaks the connection first."""

    num_workers = 1
    prefetch_factor = 2

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield torch.tensor(0)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize("which", ["training", "validation"])
def test_the_death_of_a_worker_while_it_sends_a_batch_is_raised(
    which: str,
) -> None:
    def as_torch_does(number: int, frame: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    if which == "training":
        stream = BatchStream(DiesOnTheWay(), "training")
        stream.start_epoch(0)
        batches = iter(stream.next_batch, None)
    else:
        batches = validation_batches(DiesOnTheWay(), LoaderWatch())
    before = signal.signal(signal.SIGUSR1, as_torch_does)
    try:
        with pytest.raises(RuntimeError, match="killed by signal") as raised:
            list(batches)
    finally:
        signal.signal(signal.SIGUSR1, before)

    (note,) = raised.value.__notes__
    assert note.startswith(f"raised in the {which} loader, at batch 1")
    assert note.endswith("its workers were making the batches up to 2")
    assert isinstance(raised.value.__cause__, ConnectionResetError)
