"""BackgroundSink: a slow sink on a thread of its own, behind a queue that can't grow for ever.

Whatever the sink does, a call costs the training thread the time to put something on a queue: a
server that doesn't answer, a child process that is frozen or killed, a slow disk are the thread's
trouble. What can't be taken any more is dropped and counted, and said once in the log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dream_callbacks.logging.frames import images_of, png_of_figure, videos_of
from dream_callbacks.logging.sinks.base import Histogram, OpenedSink

logger = logging.getLogger(__name__)

_Action = Callable[[OpenedSink], None]

_MOST_FAILURES_IN_A_ROW = 3
_IDLE_S = 1.0
"""An empty queue for this long lets the sink flush."""

_DRAIN_S = 30.0
"""What waits on the queue at the end of a run has this long."""


class BackgroundSink(OpenedSink):
    """Runs another sink on a daemon thread.

    Args:
        name: In messages.
        open_sink: Opens the sink; called on the thread.
        abort: Breaks whatever the thread is waiting for; called when it doesn't come to an end.
        start_timeout_s: How long the constructor waits for `open_sink`. If it takes longer, it
            goes on in the background.
        open_timeout_s: `open_sink` is given up if it takes longer and the run ends.
        stall_timeout_s: So is any other call.
        capacity: Calls that may wait; more are dropped.
    """

    def __init__(
        self,
        name: str,
        open_sink: Callable[[], OpenedSink],
        *,
        abort: Callable[[], None] = lambda: None,
        start_timeout_s: float = 5.0,
        open_timeout_s: float = 60.0,
        stall_timeout_s: float = 5.0,
        capacity: int = 10_000,
    ) -> None:
        self._name = name
        self._open_sink = open_sink
        self._abort = abort
        self._open_timeout_s = open_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._sink: OpenedSink | None = None
        self._pid = os.getpid()
        self._queue: queue.Queue[_Action | None] = queue.Queue(capacity)
        self._error: BaseException | None = None
        self._busy_since_s: float | None = time.monotonic()
        self._is_closing = False
        self._sink_is_closing = False
        self._is_dead = False
        self._num_dropped = 0
        self._warned: set[str] = set()
        self._is_open = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"{name} writer", daemon=True)
        self._thread.start()
        self._is_open.wait(start_timeout_s)

    # On the training thread

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        numbers = dict(values)
        self._put(lambda sink: sink.log_scalars(numbers, step))

    def log_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        self._put(lambda sink: sink.log_histogram(name, histogram, step))

    def log_images(self, name: str, images: Any, step: int, captions: Any = None) -> None:
        # Read now: the tensor may change, and its device memory be needed, before the thread runs.
        frames = images_of(images)
        self._put(lambda sink: sink.log_images(name, frames, step, captions))

    def log_videos(self, name: str, videos: Any, step: int, fps: int = 8) -> None:
        frames = videos_of(videos)
        self._put(lambda sink: sink.log_videos(name, frames, step, fps))

    def log_plot(self, name: str, figure: Any, step: int) -> None:
        picture = png_of_figure(figure)
        self._put(lambda sink: sink.log_plot(name, picture, step))

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._put(lambda sink: sink.log_config(config))

    def log_code(self, directory: Path) -> None:
        self._put(lambda sink: sink.log_code(directory))

    def flush(self) -> None:
        self._put(lambda sink: sink.flush())

    def close(self, error: BaseException | None = None) -> None:
        """Let the thread do what waits, then close the sink, as long as the timeouts allow."""
        if os.getpid() != self._pid or self._is_closing:
            return
        self._error = error
        self._is_closing = True
        drained_by_s = (
            time.monotonic() + _DRAIN_S + (self._open_timeout_s if self._sink is None else 0)
        )
        while self._thread.is_alive() and self._busy_for_s() < self._patience_s():
            if time.monotonic() > drained_by_s and not self._sink_is_closing:
                break
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
            self._thread.join(0.02)
        if self._thread.is_alive():
            logger.warning(
                "%s doesn't finish (%d calls wait, one takes %.0f s): given up; nothing else of "
                "the run is affected",
                self._name,
                self._queue.qsize(),
                self._busy_for_s(),
            )
            self._is_dead = True
            self._num_dropped += self._queue.qsize()
            self._abort()
            self._thread.join(2.0)
        if self._num_dropped:
            logger.warning("%s: %d calls were dropped in all", self._name, self._num_dropped)

    def _put(self, action: _Action) -> None:
        if os.getpid() != self._pid or self._is_closing:
            return  # a forked loader worker, or too late
        if self._is_dead:
            self._num_dropped += 1
            return
        try:
            self._queue.put_nowait(action)
        except queue.Full:
            self._num_dropped += 1
            self._warn_once(
                "full",
                f"{self._queue.maxsize} calls wait and it takes no more; what is logged until it "
                "answers is dropped here, not from other sinks",
            )
        if self._busy_for_s() > self._patience_s():
            self._warn_once(
                "stalled",
                f"hasn't answered for {self._busy_for_s():.0f} s; training goes on without it",
            )

    def _patience_s(self) -> float:
        """How long the thread may take for what it does now."""
        if self._sink is None:
            return self._open_timeout_s
        if self._sink_is_closing:
            return self._sink.close_timeout_s
        return self._stall_timeout_s

    def _busy_for_s(self) -> float:
        since_s = self._busy_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s: %s", self._name, message)

    # On the sink's thread

    def _work(self) -> None:
        what = "couldn't be opened"
        try:
            try:
                self._sink = self._open_sink()
            finally:
                self._is_open.set()
            self._busy_since_s = None
            what = "failed"
            self._serve(self._sink)
            if self._is_dead:
                return  # given up meanwhile
            what = "couldn't be closed"
            self._busy_since_s, self._sink_is_closing = time.monotonic(), True
            self._sink.close(self._error)
        except Exception as error:  # noqa: BLE001  # a tracker must not end the run
            self._give_up(what, error)

    def _serve(self, sink: OpenedSink) -> None:
        """Do what is on the queue until told to stop.

        Raises:
            Exception: What the sink raised, if there is no hope that the next call will do.
        """
        num_failures = 0
        while not self._is_dead and (action := self._next_action()) is not None:
            self._busy_since_s = time.monotonic()
            try:
                action(sink)
                num_failures = 0
            except Exception as error:
                num_failures += 1
                if isinstance(error, ConnectionError) or num_failures >= _MOST_FAILURES_IN_A_ROW:
                    raise
                self._warn_once(
                    type(error).__name__, f"left out what it can't take: {error!r:.300}"
                )
            finally:
                self._busy_since_s = None

    def _next_action(self) -> _Action | None:
        try:
            return self._queue.get(timeout=_IDLE_S)
        except queue.Empty:
            return lambda sink: sink.flush()

    def _give_up(self, what: str, error: Exception) -> None:
        if not self._is_dead:
            self._is_dead = True
            self._num_dropped += sum(action is not None for action in list(self._queue.queue))
            self._warn_once("dead", f"{what} and is off for the rest of the run: {error!r:.500}")
