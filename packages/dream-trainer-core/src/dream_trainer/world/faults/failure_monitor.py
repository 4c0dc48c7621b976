"""FailureWatch: the first error of any rank is soon known to all, and all of them end.

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
import faulthandler
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NoReturn

from dream_trainer.world import signals, torchrun
from dream_trainer.world.faults.failure import (
    Failure,
    Interruption,
    RemoteError,
    described,
    error_chain,
    is_lost_connection,
    is_timeout,
    place_of_main_thread,
    was_shown,
)
from dream_trainer.world.faults.failure_store import ASKS_PER_S, FailureRecord
from dream_trainer.world.faults.local_processes import Neighbours
from dream_trainer.world.rank_mismatch import grouped

if TYPE_CHECKING:
    from torch.distributed import Store

_LOOK_EVERY_S = 0.2
_PATIENCE_S = 2.0
"""How long a rank that lost a connection waits to hear why."""
_GRACE_S = 25.0
"""How long after SIGTERM it is time to say where this process is: torchrun kills it after 30 s."""
_EXIT_S = 1.0
"""How long handlers of `atexit` may take after an error."""


class Alone:
    """A world of one: an error is nobody else's business."""

    # As FailureWatch, whose docstrings say what these do.

    def watching(self, step: Callable[[], int]) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def report(self, error: BaseException, step: int) -> BaseException:
        return error

    def finish(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def close(self) -> None:
        pass


class FailureWatch:
    """One of several ranks: tells the others of an error here, and hears of theirs.

    Args:
        store: Of all ranks. A connection of its own is made to it.
        rank: This one.
        world_size: Number of ranks.
        cleanup_timeout_s: How long this process may go on after an error on some rank.
    """

    def __init__(self, store: Store, rank: int, world_size: int, cleanup_timeout_s: float) -> None:
        self._record = FailureRecord(store, world_size)
        self._rank = rank
        self._world_size = world_size
        self._cleanup_timeout_s = cleanup_timeout_s
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._first: Failure | None = None
        self._deadline_s = math.inf
        self._step: Callable[[], int] = int
        self._depth = 0
        self._span = 0  # number of watches that have ended with success
        self._has_said_goodbye = False  # in this span
        self._is_out = False
        self._place: str | None = None  # where the main thread was; by default where it is
        self._has_told_place = False
        self._thread: threading.Thread | None = None
        self._neighbours: Neighbours | None = None
        self._interrupts = False
        self._interruption: Interruption | None = None  # the last one raised in the main thread

    # What the loop calls

    @contextlib.contextmanager
    def watching(self, step: Callable[[], int]) -> Iterator[None]:
        """Watch the other ranks inside; may be nested.

        Args:
            step: Number of optimizer steps that this rank has completed.

        Raises:
            RemoteError: If another rank has failed already.
            Interruption: If another rank fails. It may come at any place inside.
        """
        self._step = step
        if self._thread is None:
            self._start()
        if not self._depth:
            self._raise_if_failed()
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
            if it is only what follows from another rank's, as anything after an interruption is.
        """
        self._depth = 0
        signals.ignore(signal.SIGCHLD)  # torch's handler raises when a loader's worker has died
        if isinstance(error, KeyboardInterrupt) and self._has_said_goodbye:
            return error  # it waited for the others to finish: nobody has failed
        if isinstance(error, RemoteError):
            first = error.failure
            error.__notes__ = []  # where it came upon this rank; it isn't the cause
        elif self._interruption is not None and not isinstance(error, KeyboardInterrupt):
            first = self._interruption.failure
            error = self._interruption.remote_error(error)
        else:
            lost = is_lost_connection(error)
            first = self._first_failure(error, step, lost=lost)
            if first.rank != self._rank and lost:
                error = Interruption(first).remote_error(error)
            else:
                error.add_note(str(first))
        self._see(first)
        is_mine = first.rank == self._rank
        with contextlib.suppress(OSError):
            torchrun.record_error(error, str(first), first.time_s + (not is_mine))
        return error

    def finish(self) -> None:
        """End the watch after success, once all ranks have come here, for as long as that takes.

        From here on this process may end without being missed.

        Raises:
            RemoteError: If another rank failed before all had come here.
        """
        self._raise_if_failed()
        self._say_goodbye()
        self._record.count(f"finished/{self._span}")
        self._record.wait_for_all(f"finished/{self._span}", look=self._raise_if_failed)
        self._record.count(f"known/{self._span}")
        if self._rank == 0 and not torchrun.keeps_store():
            # The store ends with this process, when the others have read that all are here.
            self._record.wait_for_all(f"known/{self._span}", limit_s=_PATIENCE_S)
        self._stop()
        self._span += 1
        self._has_said_goodbye = False

    def leave(self) -> None:
        """The main thread has cleaned up after an error: it is on its own from here on."""
        signals.ignore(signal.SIGTERM)
        self._is_out = True

    def close(self) -> None:
        """Say goodbye, and watch no longer."""
        if self._first is None:
            self._say_goodbye()
            self._stop()
            atexit.unregister(self._at_exit)

    def _say_goodbye(self) -> None:
        self._record.say_goodbye(self._rank, self._span)
        self._has_said_goodbye = True

    # What happened

    def _raise_if_failed(self) -> None:
        if self._first is not None:
            raise RemoteError(self._first)

    def _first_failure(self, error: BaseException, step: int, *, lost: bool) -> Failure:
        """The failure that was first: another rank's, or this error."""
        timed_out = is_timeout(error)
        wait_s = _PATIENCE_S if lost and not timed_out else 0.0
        first = self._first or self._record.first(wait_s=wait_s)
        if first is not None:
            return first
        what = f"failed in {described(error, step)}"
        if lost or timed_out:
            self._place = "waiting"
            self._record.tell_place(self._rank, self._place)
            what += f"; where each rank was: {grouped(self._record.where_ranks_are())}"
        return self._record.publish(_failure(self._rank, self._pid, what))

    def _see(self, first: Failure) -> None:
        """From now on this process is about to end."""
        with self._lock:
            if self._first is not None:
                return
            signals.ignore(signal.SIGTERM)
            self._deadline_s = time.monotonic() + self._cleanup_timeout_s
            self._first = first
        self._record.count("seen")
        if self._neighbours is not None:
            self._neighbours.wake()

    # The thread

    def _start(self) -> None:
        atexit.register(self._at_exit)
        self._neighbours = Neighbours(self._record.store, self._rank, self._world_size)
        self._thread = threading.Thread(
            target=self._watch, args=(self._neighbours,), name="failure-watch", daemon=True
        )
        self._thread.start()
        self._interrupts = signals.begin(self, self._neighbours.waker)

    def _stop(self) -> None:
        thread, self._thread = self._thread, None
        neighbours, self._neighbours = self._neighbours, None
        if thread is not None and neighbours is not None:
            signals.end(self, neighbours.waker)
            neighbours.wake()
            thread.join(_PATIENCE_S)
            if not thread.is_alive():
                neighbours.close()

    def _watch(self, neighbours: Neighbours) -> None:
        interval_s = max(_LOOK_EVERY_S, self._world_size / ASKS_PER_S)
        grace_ends_at_s = math.inf
        while self._first is None:
            ended, written = neighbours.wait(interval_s)
            if self._thread is not threading.current_thread():
                return
            is_to_end = signals.is_termination(written)
            if self._record.is_lost:
                self._on_lost_store()
            else:
                with self._record.may_be_lost():
                    self._look((*ended, *neighbours.look_for_new()), is_to_end)
            if is_to_end and self._first is None:
                signals.end_process_by(signal.SIGTERM)
            if signal.SIGTERM in written:  # somebody else handles it
                grace_ends_at_s = time.monotonic() + _GRACE_S
            if time.monotonic() > grace_ends_at_s:
                grace_ends_at_s = math.inf
                self._write(
                    f"rank {self._rank} got SIGTERM {_GRACE_S:g} s ago and is still in "
                    f"{place_of_main_thread()}"
                )
        self._see_out()

    def _look(self, ended: tuple[tuple[int, int], ...], is_to_end: bool) -> None:
        """Look at what the other ranks say, and at those on this machine that have ended."""
        for rank, pid in ended:
            self._on_end_of(rank, pid, is_to_end)
        if not self._has_told_place and self._record.is_asked_where():
            self._has_told_place = True
            self._record.tell_place(self._rank, self._place or place_of_main_thread())
        first = self._record.first()
        if first is not None:
            self._see(first)
        elif is_to_end:
            self._record.tell_termination(self._rank)

    def _on_end_of(self, rank: int, pid: int, is_to_end: bool) -> None:
        """A process on this machine has ended; that is fine after a goodbye."""
        if self._first is not None or self._record.has_said_goodbye(rank, self._span):
            return
        what = "ended without a word: killed (SIGKILL, out of memory?), crashed, or os._exit"
        if self._record.was_terminated(rank):
            if is_to_end:  # so are all
                return
            what = "was ended by SIGTERM"
        what += f"; rank {self._rank} was at step {self._step()}"
        mine = _failure(rank, pid, what)
        first = self._record.publish(mine)
        if first == mine:
            self._record.count("seen")  # in its place
        self._see(first)

    def _on_lost_store(self) -> None:
        if not torchrun.keeps_store() and self._rank != 0 and self._depth:
            host = os.environ.get("MASTER_ADDR", "")
            what = "is gone, and with it the store that the ranks meet in"
            self._see(Failure(0, 0, host, what, time.time()))

    def _see_out(self) -> None:
        """Get the main thread out, or end the process."""
        signalled_at_s = -math.inf
        while not self._is_out and time.monotonic() < self._deadline_s:
            if self._depth and self._interrupts and time.monotonic() - signalled_at_s > 1.0:
                signalled_at_s = time.monotonic()
                signals.interrupt_main_thread()
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
        place = place_of_main_thread()
        _flush()
        self._write(f"rank {self._rank} could not get out of {place} and ends here")
        self._write(str(self._first))
        os._exit(1)

    def _write(self, line: str) -> None:
        # Marked as torch marks tracebacks. Not through sys.stderr, whose lock may be held.
        with contextlib.suppress(OSError):
            os.write(2, f"[rank{self._rank}]: {line}\n".encode())

    # The end

    @property
    def has_failed(self) -> bool:
        """Whether a rank has failed, so that this process is about to end."""
        return self._first is not None

    def interrupt(self) -> None:
        """Raise in the main thread, which runs this as a signal's handler, if it may be.

        Called again while the main thread is in the loop: an interruption that was swallowed is
        raised again, one that is being handled, in a `finally` for example, is left alone.
        """
        if not self._depth or self._first is None:
            return
        if self._interruption is None or self._interruption not in error_chain(sys.exception()):
            self._interruption = Interruption(self._first)
            raise self._interruption

    def _at_exit(self) -> None:
        """After an error, make sure that the others know, and that this process ends."""
        if os.getpid() != self._pid:
            return
        if self._first is None:
            self.close()
            return
        if not was_shown(self._first):
            self._write(str(self._first))
        self._record.wait_for_all("seen", limit_s=_PATIENCE_S)
        # Others may be stuck until the sockets of this process are closed. What is left to do can
        # take seconds or hang, and no thread of Python's runs meanwhile; this one is in C.
        nowhere = open(os.devnull, "w")  # noqa: SIM115  # until the end
        faulthandler.dump_traceback_later(_EXIT_S, exit=True, file=nowhere)


def _failure(rank: int, pid: int, what: str) -> Failure:
    return Failure(rank, pid, socket.gethostname(), what, time.time())


def _flush() -> None:
    """Flush what is buffered, as far as that is possible soon."""

    def flush() -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(0.5)
