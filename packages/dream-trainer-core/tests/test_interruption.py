"""Another rank fails: wherever the main thread is in Python code, its rank reports that failure.

Rank 0 stays in one place, code that torch, Python or a user calls; rank 1 fails once it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan, save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import register_sharding
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import RankFailure
from dream_trainer.world.faults.failure import error_chain

LIMIT_S = 5.0

PLACES: dict[str, Callable[..., Any]] = {}
folder = Path()
"""Where the ranks meet; of this process."""


def place(function: Callable[[Trainer], Any]) -> Callable[[Trainer], Any]:
    """Add a place, called in training_step on rank 0; it ends with `stay`."""
    PLACES[function.__name__] = function
    return function


def stay(*_: Any, **__: Any) -> Any:
    """Say that this rank is here, and stay in Python code for ever."""
    (folder / "here").touch()
    while True:
        time.sleep(0.01)


def fail_then() -> None:
    """Fail once the other rank is where it stays."""
    while not (folder / "here").exists():
        time.sleep(0.01)
    (folder / "failed_at").write_text(str(time.time()))
    raise ZeroDivisionError("planned")


class Trainer(TinyTrainer):
    place_name = ""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.place_name:
            return super().training_step(batch, batch_idx)
        if self.world.rank == 0:
            PLACES[self.place_name](self)
            raise AssertionError(f"{self.place_name} returned")
        if self.place_name in TOGETHER:
            PLACES[self.place_name](self)
        return fail_then()

    def configure_dataloaders(self) -> tuple[Iterable[Any], Iterable[Any]]:
        loaders = super().configure_dataloaders()
        make = LOADERS.get(self.place_name)
        return loaders if make is None or self.world.rank != 0 else (make(), loaders[1])


# torch


@place
def dispatch_mode(trainer: Trainer) -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, *_: Any, **__: Any) -> Any:
            return stay()

    with Mode():
        torch.ones(1)


@place
def tensor_subclass(trainer: Trainer) -> None:
    class Subclass(Tensor):
        @classmethod
        def __torch_function__(cls, *_: Any, **__: Any) -> Any:
            return stay()

    torch.ones(1).as_subclass(Subclass).sqrt()


@place
def custom_operator(trainer: Trainer) -> None:
    torch.library.custom_op(
        "interruption::op", stay, mutates_args=(), schema="(Tensor x) -> Tensor"
    )(torch.ones(1))


@place
def dtensor_sharding_rule(trainer: Trainer) -> None:
    @torch.library.custom_op("interruption::sharded", mutates_args=())
    def op(x: Tensor) -> Tensor:
        return x.clone()

    op.register_fake(torch.empty_like)
    register_sharding(torch.ops.interruption.sharded.default)(stay)
    op(DTensor.from_local(torch.ones(2), trainer.world.get_mesh("dp_replicate"), run_check=False))


@place
def module_hook(trainer: Trainer) -> None:
    module = nn.Linear(1, 1)
    module.register_forward_hook(stay)
    module(torch.ones(1, 1))


@place
def fsdp_forward(trainer: Trainer) -> None:
    # On both ranks, which gather the weights for it.
    trainer.model.blocks[0].register_forward_hook(stay if trainer.world.rank == 0 else _fail_then)
    trainer.model(torch.ones(1, 4))


def _fail_then(*_: Any) -> None:
    fail_then()


@place
def ddp_communication_hook(trainer: Trainer) -> None:
    model = DistributedDataParallel(nn.Linear(1, 1))
    model.register_comm_hook(None, lambda state, bucket: stay())
    if trainer.world.rank == 0:
        model(torch.ones(1, 1)).sum().backward()


@place
def backward(trainer: Trainer) -> None:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return stay()

    Function.apply(torch.ones(1, requires_grad=True)).sum().backward()


@place
def tensor_hook(trainer: Trainer) -> None:
    x = torch.ones(1, requires_grad=True)
    x.register_hook(stay)
    (2 * x).sum().backward()


@place
def accumulation_hook(trainer: Trainer) -> None:
    x = torch.ones(1, requires_grad=True)
    x.register_post_accumulate_grad_hook(stay)
    (2 * x).sum().backward()


@place
def end_of_backward(trainer: Trainer) -> None:
    x = torch.ones(1, requires_grad=True)
    engine: Any = torch.autograd.Variable._execution_engine  # noqa: SLF001  # as FSDP does
    x.register_hook(lambda _: engine.queue_callback(stay))
    (2 * x).sum().backward()


def _recomputed(*, use_reentrant: bool) -> None:
    num_calls = 0

    def function(x: Tensor) -> Any:
        nonlocal num_calls
        num_calls += 1
        return stay() if num_calls == 2 else x.sin()

    y: Any = checkpoint(function, torch.ones(1, requires_grad=True), use_reentrant=use_reentrant)
    y.sum().backward()


@place
def recomputation(trainer: Trainer) -> None:
    _recomputed(use_reentrant=False)


@place
def reentrant_recomputation(trainer: Trainer) -> None:
    _recomputed(use_reentrant=True)


@place
def function_transform(trainer: Trainer) -> None:
    torch.func.vmap(torch.func.grad(stay))(torch.ones(2))


@place
def compiler_backend(trainer: Trainer) -> None:
    torch.compile(torch.sin, backend=stay)(torch.ones(1))


@place
def compiler_that_suppresses_errors(trainer: Trainer) -> None:
    with torch._dynamo.config.patch(suppress_errors=True):  # noqa: SLF001
        torch.compile(torch.sin, backend=stay)(torch.ones(1))
    time.sleep(60)


@place
def tracing(trainer: Trainer) -> None:
    constant = torch.compiler.assume_constant_result(lambda: stay())
    torch.compile(lambda x: x * constant(), backend="eager")(torch.ones(1))


@place
def fake_implementation(trainer: Trainer) -> None:
    @torch.library.custom_op("interruption::faked", mutates_args=())
    def op(x: Tensor) -> Tensor:
        return x.clone()

    op.register_fake(stay)
    torch.compile(op, backend="eager")(torch.ones(1))


@place
def future_callback(trainer: Trainer) -> None:
    future: torch.futures.Future[int] = torch.futures.Future()
    then = future.then(stay)
    future.set_result(1)
    then.wait()


@place
def distributed_checkpoint(trainer: Trainer) -> None:
    class Planner(DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            return stay()

    save({"x": torch.ones(1)}, checkpoint_id=folder / "x", planner=Planner(), no_dist=True)


@place
def profiler(trainer: Trainer) -> None:
    with torch.profiler.profile():
        stay()


# torch's loader


class Stays(Dataset[Tensor]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return stay()


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "dataset": lambda: DataLoader(Stays(), batch_size=2),
    "collate_function": lambda: DataLoader([1] * 16, batch_size=2, collate_fn=stay),  # type: ignore[arg-type]
    "loader_with_workers": lambda: DataLoader(Stays(), batch_size=2, num_workers=1),
}
TOGETHER = {"fsdp_forward", "ddp_communication_hook"}


# Python, and users


@place
def logging_handler(trainer: Trainer) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                stay()
            except Exception:  # noqa: BLE001  # as logging's own handlers do
                self.handleError(record)

    logger = logging.getLogger("interruption")
    logger.addHandler(Handler())
    logger.warning("")
    time.sleep(60)


@place
def event_loop(trainer: Trainer) -> None:
    async def step() -> None:
        asyncio.get_running_loop().call_soon(stay)
        await asyncio.sleep(60)

    asyncio.run(step())


@place
def destructor(trainer: Trainer) -> None:
    class Last:
        def __del__(self) -> None:
            stay()

    Last()
    stay()


@place
def except_exception(trainer: Trainer) -> None:
    with contextlib.suppress(Exception):
        stay()
    time.sleep(60)


@place
def retrying_on_exceptions(trainer: Trainer) -> None:
    while True:
        with contextlib.suppress(Exception):
            stay()


@place
def except_runtime_error(trainer: Trainer) -> None:
    try:
        stay()
    except RuntimeError as error:
        raise ValueError("wrapped") from error


@place
def except_everything(trainer: Trainer) -> None:
    with contextlib.suppress(BaseException):
        stay()
    time.sleep(60)


@place
def wrapping_everything(trainer: Trainer) -> None:
    try:
        stay()
    except BaseException as error:
        raise ValueError("wrapped") from error


@place
def wrapping_twice(trainer: Trainer) -> None:
    try:
        wrapping_everything(trainer)
    except ValueError as error:
        raise ValueError("wrapped") from KeyError(error)


@place
def exit_on_everything(trainer: Trainer) -> None:
    try:
        stay()
    except BaseException:  # noqa: BLE001  # that is the case
        raise SystemExit(3) from None


# What became of rank 0


@dataclass
class End:
    """How a rank's `fit` ended."""

    kind: str
    text: str
    """As Python shows the error."""
    was_seen: bool
    """By on_exception, the same object."""
    after_s: float
    """From the failure of rank 1."""

    @property
    def last_line(self) -> str:
        return self.text.splitlines()[-1]


class Sees(Callback[TinyTrainer]):
    exception: BaseException | None = None

    def on_exception(self, exception: BaseException) -> None:
        self.exception = exception


def fit(root: str, name: str, callbacks: Iterable[Callback[Any]] = ()) -> End | None:
    global folder
    folder = Path(root)
    sees = Sees()
    make = DeviceParameters.FSDP if name == "fsdp_forward" else DeviceParameters
    trainer = Trainer(tiny_config(root, [sees, *callbacks], device=make(device="cpu"), n_epochs=1))
    trainer.place_name = name
    try:
        trainer.fit()
    except BaseException as error:  # noqa: BLE001  # Ctrl-C and SystemExit too
        failed_at = float((folder / "failed_at").read_text())
        was_seen = error is sees.exception
        return End(type(error).__name__, traceback.format_exc(), was_seen, time.time() - failed_at)
    return None


def interrupted(tmp_path: Path, name: str, *callbacks: Callback[Any]) -> End:
    """What became of rank 0."""
    end, failed = run_on_ranks(fit, 2, str(tmp_path), name, callbacks)
    assert failed.kind == "ZeroDivisionError"
    assert end is not None
    return end


FAILED = (
    r"dream_trainer.world.faults.failure.RemoteError: rank 1 \(pid \d+ on "
    r".*ZeroDivisionError: planned"
)
LOST = {"future_callback", "distributed_checkpoint"}
"""torch leaves a text of the interruption, or keeps it where Python doesn't look."""


@pytest.mark.parametrize("name", [*PLACES, *LOADERS])
def test_the_failure_of_another_rank_is_reported_from(name: str, tmp_path: Path) -> None:
    end = interrupted(tmp_path, name)

    assert end.kind == "RemoteError", end.text
    assert re.fullmatch(FAILED, end.last_line), end.text
    assert end.was_seen, "by on_exception, the same object"
    assert end.after_s < LIMIT_S
    if name in LOST:
        assert "was the direct cause of" in end.text
        return
    assert end.text.count("Traceback (most recent call last)") == 1, "nothing else is shown"
    if name in PLACES:
        assert re.search(rf"in (stay|{name})\b", end.text), "where this rank was"


@place
def failing_after_all(trainer: Trainer) -> None:
    with contextlib.suppress(BaseException):
        stay()
    raise ValueError("of its own")


def test_an_error_after_a_swallowed_interruption_is_shown_as_the_cause(tmp_path: Path) -> None:
    end = interrupted(tmp_path, "failing_after_all")

    assert end.kind == "RemoteError"
    assert re.fullmatch(FAILED, end.last_line)
    assert "\nValueError: of its own\n" in end.text


@place
def failing_too(trainer: Trainer) -> None:
    try:
        (folder / "here").touch()
        raise ValueError("of its own")
    finally:
        _busy(0.8)  # the other rank fails, and is known to have failed


def test_an_error_on_its_way_out_is_not_replaced_by_an_interruption(tmp_path: Path) -> None:
    end = interrupted(tmp_path, "failing_too")

    assert end.kind == "ValueError", end.text
    assert re.fullmatch(FAILED.partition(": ")[2], end.last_line), "a note"


@place
def handling(trainer: Trainer) -> None:
    try:
        raise ValueError("handled")
    except ValueError:
        stay()


def test_a_rank_that_waits_while_it_handles_an_error_is_interrupted(tmp_path: Path) -> None:
    end = interrupted(tmp_path, "handling")

    assert end.kind == "RemoteError", end.text
    assert end.after_s < LIMIT_S


def fail_on_all_ranks(root: str) -> str:
    """Rank 1 fails a second before rank 0, with an error that is raised on all ranks."""

    class Fails(Callback[TinyTrainer]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if self.trainer.world.rank == 0:
                _busy(1.0)
            raise RankFailure("the disk of rank 0 is full")

    try:
        TinyTrainer(tiny_config(root, [Fails()])).fit()
    except BaseException as error:  # noqa: BLE001  # an interruption too
        return f"{type(error).__name__}: {error}"
    return ""


def test_an_error_of_all_ranks_is_raised_as_such_on_the_last_one_too(tmp_path: Path) -> None:
    ends = run_on_ranks(fail_on_all_ranks, 2, str(tmp_path))

    assert ends == ["RankFailure: the disk of rank 0 is full"] * 2


@place
def pressing_ctrl_c(trainer: Trainer) -> None:
    try:
        stay()
    finally:
        raise KeyboardInterrupt


def test_ctrl_c_in_an_interruption_is_ctrl_c(tmp_path: Path) -> None:
    end = interrupted(tmp_path, "pressing_ctrl_c")

    assert end.kind == "KeyboardInterrupt"
    assert re.fullmatch(FAILED.partition(": ")[2], end.last_line), "a note"


@place
def cleaning_up(trainer: Trainer) -> None:
    try:
        stay()
    finally:
        with contextlib.suppress(KeyError):
            {}["this"]  # Python's idea of what is being handled changes, and changes back
        _busy(2.5)
        (folder / "clean").touch()


def _busy(duration_s: float) -> None:
    end_s = time.monotonic() + duration_s
    while time.monotonic() < end_s:
        time.sleep(0.01)


def test_clean_up_on_the_way_out_is_not_interrupted_again(tmp_path: Path) -> None:
    end = interrupted(tmp_path, "cleaning_up")

    assert end.kind == "RemoteError", end.text
    assert (tmp_path / "clean").exists()


class Closes(Callback[TinyTrainer]):
    """Is closing on rank 0 when rank 1 fails while it closes."""

    def __init__(self, *, swallows: bool) -> None:
        self.swallows = swallows

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.trainer.stop("enough")

    def post_fit(self) -> None:
        if self.trainer.world.rank == 1:
            if self.trainer.exception is None:
                fail_then()
            return
        with contextlib.suppress(BaseException if self.swallows else ()):
            stay()


class ClosesLater(Callback[TinyTrainer]):
    def post_fit(self) -> None:
        if self.trainer.world.rank == 0:
            _busy(2.5)
            (folder / "closed").touch()


@pytest.mark.parametrize("swallows", [False, True])
def test_the_failure_of_another_rank_is_reported_after_a_stop(
    swallows: bool, tmp_path: Path
) -> None:
    end = interrupted(tmp_path, "", Closes(swallows=swallows))

    assert end.kind == "RemoteError"
    assert re.fullmatch(FAILED.replace("training_step", "post_fit"), end.last_line), end.text
    assert end.after_s < LIMIT_S


def test_callbacks_after_an_interrupted_one_close_without_interruption(tmp_path: Path) -> None:
    end = interrupted(tmp_path, "", Closes(swallows=False), ClosesLater())

    assert end.kind == "RemoteError"
    assert (tmp_path / "closed").exists()


def test_a_chain_of_errors_may_have_branches_and_cycles() -> None:
    first, second, third = ValueError("1"), ValueError("2"), ValueError("3")
    first.__cause__, first.__context__ = second, third
    third.__context__ = first

    assert set(error_chain(first)) == {first, second, third}
    assert len(list(error_chain(first))) == 3
    assert list(error_chain(None)) == []
