"""Failure: the first error of any rank becomes known to all, and all of them are gone soon after.

Ranks that still run may be stuck in a collective that the failed one never joins, so nothing here
is a collective. The first error is written into the store that the ranks found each other by, once.
A thread of each rank looks for it, on a connection of its own; it also sees when the process of a
rank on the same machine dies. Then it gets the main thread out of wherever it is, for clean-up. A
main thread that can't be got out, as it is in C++ code, is ended with its process.

Nothing of this costs the main thread anything until there is an error.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from dream_trainer.world import launcher
from dream_trainer.world.neighbours import Neighbours

if TYPE_CHECKING:
    from types import FrameType

    from torch.distributed import Store

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2
_LOOKS_PER_S = 5000
"""How often all ranks together may ask the store."""
_PATIENCE_S = 2.0
"""How long a rank that lost a connection waits to hear why."""
_EXIT_S = 1.0
"""How long handlers of `atexit` may take after an error."""
_STORE_TIMEOUT_S = 3.0
_STARTED_AT_S = time.time()

_LOST_CONNECTION = re.compile(
    r"gloo/transport|Connection (closed|reset|refused)|Broken pipe|ncclRemoteError"
    r"|communicator was aborted|Socket closed|socket error",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """The first error of a run.

    Args:
        rank: Which rank failed.
        pid: Of its process.
        host: Where that ran.
        what: What happened to it, and where, in one line.
        time_s: When; seconds of Unix time.
    """

    rank: int
    pid: int
    host: str
    what: str
    time_s: float

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host}) {self.what}"


class RemoteError(RuntimeError):
    """Another rank failed first, so this one ends too.

    Attributes:
        failure: What happened there.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Alone:
    """A world of one: an error is nobody else's business."""

    def watching(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def report(self, error: BaseException, step: int) -> BaseException:
        return error

    def say_goodbye(self) -> None:
        pass

    def finish(self, *, together: bool = True) -> None:
        pass

    def leave(self) -> None:
        pass

    def close(self) -> None:
        pass


class FailureWatch(Alone):
    """One of several ranks: tells the others of an error here, and hears of theirs.

    Args:
        store: Of all ranks. A connection of its own is made to it.
        rank: This one.
        world_size: Number of ranks.
        cleanup_timeout_s: How long this process may go on after an error on some rank.
    """

    def __init__(self, store: Store, rank: int, world_size: int, cleanup_timeout_s: float) -> None:
        # A client waits for its answer before it asks again, and the process group's may wait long.
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        self._store.set_timeout(timedelta(seconds=_STORE_TIMEOUT_S))
        self._rank = rank
        self._world_size = world_size
        self._cleanup_timeout_s = cleanup_timeout_s
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._first: Failure | None = None
        self._deadline_s = math.inf
        self._depth = 0
        self._round = 0  # watches that have ended with success
        self._is_out = False
        self._is_store_lost = False
        self._thread: threading.Thread | None = None
        self._neighbours: Neighbours | None = None
        self._interrupts = _interrupt_on_signal(self)
        self._stale = self._written_before_this_attempt()
        atexit.register(self._at_exit)

    # What the loop calls

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the other ranks inside; may be nested.

        Raises:
            RemoteError: If another rank failed. It may come at any place inside.
        """
        if self._thread is None:
            self._start()
        if self._first is not None and not self._depth:
            raise RemoteError(self._first)
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth = 0  # from here on nobody is interrupted: it is time to clean up
            raise
        self._depth -= 1

    def report(self, error: BaseException, step: int) -> BaseException:
        """Make an error known to all ranks, unless another rank was the first.

        Starts the time that clean-up may take. Not collective.

        Args:
            error: What left the loop on this rank.
            step: Optimizer steps completed.

        Returns:
            What to raise: the error itself, with a note that names the first one; a RemoteError
            if it is only what follows from another rank's.
        """
        self._depth = 0
        if isinstance(error, RemoteError):
            first = error.failure
            error.__notes__ = []  # where it came upon this rank; it isn't the cause
        else:
            lost = _is_lost_connection(error)
            first = self._known(wait_s=_PATIENCE_S if lost else 0.0) or self._publish(
                self._failure(self._rank, self._pid, f"failed in {_described(error, step)}")
            )
            if first.rank != self._rank and lost:
                error = _caused_by(RemoteError(first), error)
            else:
                error.add_note(str(first))
        self._see(first)
        is_mine = first.rank == self._rank
        with contextlib.suppress(OSError):
            launcher.record_error(error, str(first), first.time_s + (not is_mine))
        return error

    def say_goodbye(self) -> None:
        """From now on until `finish` this process may end, by a signal, without being missed."""
        with self._store_may_be_gone():
            self._store.set(self._goodbye_key(self._rank), "")

    def finish(self, *, together: bool = True) -> None:
        """End the watch after success.

        Args:
            together: First wait until all ranks have come here, for as long as that takes.

        Raises:
            RemoteError: If another rank failed while this one waited.
        """
        self.say_goodbye()
        if together:
            with self._store_may_be_gone():
                self._wait_for_all(f"finished/{self._round}")
                self._store.add(f"known/{self._round}", 1)
                if self._rank == 0 and not launcher.keeps_store():
                    # The store ends with this process, when the others have read that all are here.
                    self._wait_for_all(f"known/{self._round}", first=0, limit_s=_PATIENCE_S)
        self._stop()
        self._round += 1

    def leave(self) -> None:
        """The main thread has cleaned up after an error: it is on its own from here on."""
        _ignore_sigterm()  # a callback may have given it back
        self._is_out = True

    def close(self) -> None:
        """Say goodbye, and watch no longer."""
        if self._first is None:
            self.say_goodbye()
            self._stop()

    def _goodbye_key(self, rank: int) -> str:
        """The key that a rank sets where it may end without being missed."""
        return f"goodbye/{self._round}/{rank}"

    # The record

    def _known(self, wait_s: float) -> Failure | None:
        """The first error, if one was written; waits for it if asked to."""
        give_up_s = time.monotonic() + wait_s
        while self._first is None:
            with self._store_may_be_gone():
                if self._store.check(["first"]):
                    found = self._store.get("first")
                    if found != self._stale:
                        return Failure(**json.loads(found))
            if time.monotonic() >= give_up_s:
                return None
            time.sleep(0.05)
        return self._first

    def _publish(self, failure: Failure) -> Failure:
        """Write an error down, if none is there; returns the one that is."""
        record = json.dumps(asdict(failure)).encode()
        with self._store_may_be_gone():
            expected = "" if self._stale is None else self._stale.decode()
            record = self._store.compare_set("first", expected, record.decode())
        return Failure(**json.loads(record))

    def _written_before_this_attempt(self) -> bytes | None:
        """An error that was there before this process was: torchrun may keep the store's keys."""
        with self._store_may_be_gone():
            if self._store.check(["first"]):
                found: bytes = self._store.get("first")
                if json.loads(found)["time_s"] < _STARTED_AT_S - _PATIENCE_S:
                    return found
        return None

    def _failure(self, rank: int, pid: int, what: str) -> Failure:
        return Failure(rank, pid, socket.gethostname(), what, time.time())

    def _see(self, first: Failure) -> None:
        """From now on this process is about to end."""
        with self._lock:
            if self._first is not None:
                return
            _ignore_sigterm()
            self._deadline_s = time.monotonic() + self._cleanup_timeout_s
            self._first = first
        self._count_seen()
        if self._neighbours is not None:
            self._neighbours.wake()

    def _count_seen(self) -> None:
        with self._store_may_be_gone():
            self._store.add("seen", 1)

    @contextlib.contextmanager
    def _store_may_be_gone(self) -> Iterator[None]:
        try:
            yield
        except (dist.DistError, RuntimeError) as error:
            if isinstance(error, RemoteError):
                raise
            self._is_store_lost = True

    def _wait_for_all(self, key: str, *, first: int = 1, limit_s: float = math.inf) -> None:
        give_up_s = time.monotonic() + limit_s
        here = self._store.add(key, first)
        while here < self._world_size and time.monotonic() < give_up_s:
            if self._first is not None:
                raise RemoteError(self._first)
            time.sleep(max(0.02, self._world_size / _LOOKS_PER_S))
            here = self._store.add(key, 0)

    # The thread

    def _start(self) -> None:
        with self._store_may_be_gone():
            self._neighbours = Neighbours(self._store, self._rank, self._world_size)
            self._thread = threading.Thread(
                target=self._watch, args=(self._neighbours,), name="failure-watch", daemon=True
            )
            self._thread.start()

    def _stop(self) -> None:
        thread, self._thread = self._thread, None
        neighbours, self._neighbours = self._neighbours, None
        if thread is not None and neighbours is not None:
            neighbours.wake()
            thread.join(_PATIENCE_S)
            if not thread.is_alive():
                neighbours.close()

    def _watch(self, neighbours: Neighbours) -> None:
        interval_s = max(_LOOK_EVERY_S, self._world_size / _LOOKS_PER_S)
        while self._first is None:
            ended = neighbours.wait(interval_s)
            if self._thread is not threading.current_thread():
                return
            if self._is_store_lost:
                self._on_lost_store()
                if self._first is None:
                    continue
            with self._store_may_be_gone():
                ended += neighbours.look_for_new()
                for rank, pid in ended:
                    self._on_end_of(rank, pid)
            first = self._known(wait_s=0.0)
            if first is not None:
                self._see(first)
        self._see_out()

    def _on_end_of(self, rank: int, pid: int) -> None:
        """A process on this machine has ended; that is fine after a goodbye."""
        if self._first is None and not self._store.check([self._goodbye_key(rank)]):
            _ignore_sigterm()  # torchrun has noticed too
            what = "ended without a word: killed (SIGKILL, out of memory?), crashed, or os._exit"
            mine = self._failure(rank, pid, what)
            first = self._publish(mine)
            if first == mine:
                self._count_seen()  # in its place
            self._see(first)

    def _on_lost_store(self) -> None:
        if not launcher.keeps_store() and self._rank != 0 and self._depth:
            host = os.environ.get("MASTER_ADDR", "")
            what = "is gone, and with it the store that the ranks meet in"
            self._see(Failure(0, 0, host, what, time.time()))

    def _see_out(self) -> None:
        """Get the main thread out, or end the process."""
        signalled_at_s = -math.inf
        while not self._is_out and time.monotonic() < self._deadline_s:
            if self._depth and self._interrupts and time.monotonic() - signalled_at_s > 1.0:
                signalled_at_s = time.monotonic()
                signal.pthread_kill(_main_thread(), signal.SIGURG)
            time.sleep(0.02)
        if not self._is_out:
            self._end_process()
        while threading.main_thread().is_alive():
            time.sleep(0.05)
        # Python waits for threads of callbacks now; one of them may be stuck in a collective.
        left_s = self._deadline_s + _PATIENCE_S - time.monotonic()
        time.sleep(max(left_s, self._cleanup_timeout_s))
        self._end_process()

    def _end_process(self) -> NoReturn:
        place = _place_of_main_thread()
        _flush()
        _write(f"rank {self._rank} could not get out of {place} and ends here\n{self._first}")
        os._exit(1)

    # The end

    def interrupt(self) -> None:
        """Raise in the main thread, which runs this as a signal's handler, if it may be."""
        if self._depth and self._first is not None:
            self._depth = 0
            raise RemoteError(self._first)

    def _at_exit(self) -> None:
        """After an error, make sure that the others know, and that this process ends."""
        if os.getpid() != self._pid:
            return
        if self._first is None:
            self.close()
            return
        if not _was_shown(self._first):
            _write(str(self._first))
        give_up_s = time.monotonic() + _PATIENCE_S
        with self._store_may_be_gone():
            while self._store.add("seen", 0) < self._world_size and time.monotonic() < give_up_s:
                time.sleep(max(0.02, self._world_size / _LOOKS_PER_S))
        # Others may be stuck until the sockets of this process are closed. What is left to do can
        # take seconds or hang, and no thread of Python's runs meanwhile; this one is in C.
        nowhere = open(os.devnull, "w")  # noqa: SIM115  # until the end
        faulthandler.dump_traceback_later(_EXIT_S, exit=True, file=nowhere)


def _caused_by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def _is_lost_connection(error: BaseException) -> bool:
    """Whether an error may be what follows from the death of another rank."""
    each: BaseException | None = error
    while each is not None:
        from_a_worker = isinstance(each, OSError)  # of a loader; collectives raise RuntimeErrors
        if isinstance(each, dist.DistError) or (
            not from_a_worker and _LOST_CONNECTION.search(str(each))
        ):
            return True
        each = each.__cause__ or each.__context__
    return False


def _described(error: BaseException, step: int) -> str:
    """Where an error was raised, and what it is, in one line."""
    text = " ".join(str(error).split())[:300]
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("raised in ")]
    if notes:
        place = re.sub(r" on rank \d+", "", notes[0].removeprefix("raised in "))
    else:
        place = _place(traceback.extract_tb(error.__traceback__))
    return f"{place}: {what}" if "at step" in place else f"{place} at step {step}: {what}"


_OURS = str(Path(__file__).parents[1])
_TORCHS = str(Path(torch.__file__).parent)


def _place(stack: traceback.StackSummary) -> str:
    """The innermost place in a stack that is the user's."""
    users = [each for each in stack if not each.filename.startswith((_OURS, _TORCHS, "<"))]
    if not stack:
        return "unknown code"
    frame = (users or stack)[-1]
    return f"{frame.name} ({Path(frame.filename).name}, line {frame.lineno})"


def _place_of_main_thread() -> str:
    frame = sys._current_frames().get(_main_thread())  # noqa: SLF001  # documented, despite its name
    if frame is None:
        return "Python's shutdown"
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"


def _main_thread() -> int:
    ident = threading.main_thread().ident
    assert ident is not None, "it runs"
    return ident


def _interrupt_on_signal(watch: FailureWatch) -> bool:
    """Let SIGURG interrupt the main thread; a system call that waits is interrupted too.

    Nobody uses that signal, and one that comes too late is ignored by default.

    Returns:
        False outside of the main thread, or if somebody does use it.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    before: Any = signal.getsignal(signal.SIGURG)
    if before not in (signal.SIG_DFL, signal.SIG_IGN, _on_urgent):
        return False
    _watches.append(watch)
    signal.signal(signal.SIGURG, _on_urgent)
    return True


_watches: list[FailureWatch] = []


def _on_urgent(number: int, frame: FrameType | None) -> None:
    for watch in tuple(_watches):
        watch.interrupt()


def _was_shown(failure: Failure) -> bool:
    """Whether the traceback that ended this process ends with a failure."""
    error = getattr(sys, "last_value", None)
    if error is None:
        return False
    lines: tuple[str, ...] = (str(error), *getattr(error, "__notes__", ()))
    return lines[-1] == str(failure)


def _ignore_sigterm() -> None:
    """This process ends in time, and has something to say before. In any thread, unlike signal's.

    A launcher that notices that one rank has ended sends SIGTERM to the others.
    """
    ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(int(signal.SIG_IGN)))


def _write(text: str) -> None:
    # Not through sys.stderr, whose lock the main thread may hold.
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _flush() -> None:
    """Flush what is buffered, as far as that is possible soon."""

    def flush() -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(0.5)
