"""Early exchanges: a request that the schedule would make too late, because steps got longer."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import Requests, World


class Slows(Callback[TinyTrainer]):
    """Steps of 10 ms get longer by 1 s; in the first long one rank 1 requests a stop."""

    NUM_SHORT = 150

    def __init__(self, offset: int) -> None:
        self.num_short = self.NUM_SHORT + offset

    def pre_train_step(self, batch: Any, batch_idx: int) -> Any:
        step = self.trainer.global_step
        time.sleep(0.01)
        if step >= self.num_short:
            if step == self.num_short and self.trainer.world.rank == 1:
                threading.Timer(0.1, self.trainer.stop, args=("enough",)).start()
            time.sleep(1.0)
        return batch


def stopped_at(root: str, offset: int) -> tuple[int, str | None]:
    """The number of long steps until the stop, and its reason."""
    callback = Slows(offset)
    config = tiny_config(root, [callback], n_epochs=1)
    config.num_samples = 4 * 1000
    trainer = TinyTrainer(config)
    trainer.fit()
    return trainer.global_step - callback.num_short, trainer.stop_reason


@pytest.mark.parametrize("offset", [0, 10, 37])
def test_a_stop_takes_effect_soon_after_steps_got_longer(tmp_path: Path, offset: int) -> None:
    first, second = run_on_ranks(stopped_at, 2, str(tmp_path), offset)

    assert first == second
    num_long, reason = first
    assert reason == "enough"
    assert 2 <= num_long <= 3, "two steps; the schedule alone would take up to eighty"


def agreed(num_ticks: int, num_ranks: int) -> tuple[list[tuple[int, int]], int]:
    """At which ticks requests were agreed, and how many early exchanges were announced.

    All ranks are fast, then slow, and so on; each has its own pace and asks at its own times.
    """
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    requests = Requests(world)
    request = requests.register("save")
    own = random.Random(world.rank)
    monitor = world.failure_monitor()
    seen = []
    with monitor.watching(lambda: 0):
        requests.start()
        for tick in range(num_ticks):
            requests.receive()
            if request.take():
                seen.append((tick, requests.num_agreed("save")))
            is_slow = tick % 60 > 45
            time.sleep(own.uniform(0.1, 0.2) if is_slow else own.uniform(0.0, 0.01))
            if own.random() < (0.3 if is_slow else 0.02):
                request.ask()
            requests.send("train" if tick % 5 else "validate")
            if tick % 97 == 96:
                requests.exchange()
        requests.finish()
        num_announced = monitor._store.num_questions()  # type: ignore[union-attr]  # noqa: SLF001
        monitor.finish()
    world.shutdown()
    return seen, num_announced


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_agree_at_the_same_ticks_however_they_are_apart(num_ranks: int) -> None:
    (ticks, num_announced), *others = run_on_ranks(agreed, num_ranks, 180, num_ranks)

    assert all(each == ticks for each, _ in others)
    assert len(ticks) > 5
    assert num_announced > 3, "early exchanges happened"


def agreed_with_stalls(num_ticks: int) -> list[tuple[int, int]]:
    """At which ticks requests were agreed if rank 1 stalls while its request is in flight.

    Rank 0 doesn't wait for it: it passes the scheduled read before it sees the announcement.
    """
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    requests = Requests(world)
    request = requests.register("save")
    monitor = world.failure_monitor()
    seen = []
    with monitor.watching(lambda: 0):
        requests.start()
        num_in_flight = 0
        for tick in range(num_ticks):
            requests.receive()
            if request.take():
                seen.append((tick, requests.num_agreed("save")))
            time.sleep(0.01)
            if world.rank == 1 and tick > 100:
                num_in_flight = num_in_flight + 1 if requests.is_in_flight else 0
                if num_in_flight == 4:
                    time.sleep(0.5)
                request.ask()
            requests.send("train")
        requests.finish()
        monitor.finish()
    world.shutdown()
    return seen


def ends_in_flight() -> bool:
    """Whether a run ends in which rank 1 stalls while the last exchange is in flight.

    Rank 0 doesn't wait for it: it ends the run, and reads the exchange, before rank 1 announces.
    """
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    requests = Requests(world)
    request = requests.register("save")
    monitor = world.failure_monitor()
    num_in_flight = 0
    with monitor.watching(lambda: 0):
        requests.start()
        for tick in range(2000):
            requests.receive()
            time.sleep(0.005)
            num_in_flight = num_in_flight + 1 if requests.is_in_flight else 0
            if world.rank == 1 and tick > 100:
                if num_in_flight == 4:
                    time.sleep(1.0)
                request.ask()
            requests.send("train")
            if tick > 100 and num_in_flight == 6:
                break
        has_announced = monitor._store.num_questions() > 0  # type: ignore[union-attr]  # noqa: SLF001
        requests.finish()
        monitor.finish()
    world.shutdown()
    return has_announced


def test_a_run_ends_while_ranks_agree_on_an_early_exchange() -> None:
    assert run_on_ranks(ends_in_flight, 2)[1]


def test_ranks_agree_if_one_has_passed_the_scheduled_tick() -> None:
    first, second = run_on_ranks(agreed_with_stalls, 2, 400)

    assert first == second
    assert len(first) >= 2
