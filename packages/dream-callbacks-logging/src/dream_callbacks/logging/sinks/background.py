"""BackgroundSink: runs a slow sink on its own thread, behind a bounded queue.

A call costs the training thread one put on a queue. An unresponsive server, a frozen or killed
child process or a slow disk only block the sink's thread. Calls that don't fit in the queue are
dropped and counted, with one warning in the log.
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

from dream_callbacks.logging.frames import figure_png, image_frames, video_frames
from dream_callbacks.logging.sinks.base import Histogram, OpenedSink

logger = logging.getLogger(__name__)

_Action = Callable[[OpenedSink], None]

_MOST_FAILURES_IN_A_ROW = 3
_IDLE_S = 1.0
"""The sink is flushed after the queue has been empty for this long."""

_DRAIN_S = 30.0
"""Time limit for the calls on the queue at the end of a run."""


class BackgroundSink(OpenedSink):
    """Runs another sink on a daemon thread.

    Args:
        name: Name of the sink in messages.
        open_sink: Opens the sink; called on the thread.
        abort: Unblocks the thread; called if it doesn't finish in time.
        start_timeout_s: How long the constructor waits for `open_sink`, which then continues in
            the background.
        open_timeout_s: At the end of a run, `open_sink` is abandoned after this time.
        stall_timeout_s: The same for any other call.
        capacity: Maximum number of queued calls; more are dropped.
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
        # Copied now: the tensor may change, or its device memory be freed, before the thread runs.
        frames = image_frames(images)
        self._put(lambda sink: sink.log_images(name, frames, step, captions))

    def log_videos(self, name: str, videos: Any, step: int, fps: int = 8) -> None:
        frames = video_frames(videos)
        self._put(lambda sink: sink.log_videos(name, frames, step, fps))

    def log_plot(self, name: str, figure: Any, step: int) -> None:
        picture = figure_png(figure)
        self._put(lambda sink: sink.log_plot(name, picture, step))

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._put(lambda sink: sink.log_config(config))

    def log_code(self, directory: Path) -> None:
        self._put(lambda sink: sink.log_code(directory))

    def flush(self) -> None:
        self._put(lambda sink: sink.flush())

    def close(self, error: BaseException | None = None) -> None:
        """Process the queued calls, then close the sink, within the timeouts."""
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
                "%s did not finish (%d calls queued, one has taken %.0f s) and was abandoned; the "
                "rest of the run is not affected",
                self._name,
                self._queue.qsize(),
                self._busy_for_s(),
            )
            self._is_dead = True
            self._num_dropped += self._queue.qsize()
            self._abort()
            self._thread.join(2.0)
        if self._num_dropped:
            logger.warning("%s: %d calls were dropped in total", self._name, self._num_dropped)

    def _put(self, action: _Action) -> None:
        if os.getpid() != self._pid or self._is_closing:
            return  # a forked loader worker, or closed
        if self._is_dead:
            self._num_dropped += 1
            return
        try:
            self._queue.put_nowait(action)
        except queue.Full:
            self._num_dropped += 1
            self._warn_once(
                "full",
                f"the queue is full ({self._queue.maxsize} calls); calls are dropped until it "
                "responds; other sinks are not affected",
            )
        if self._busy_for_s() > self._patience_s():
            self._warn_once(
                "stalled",
                f"hasn't responded for {self._busy_for_s():.0f} s; training continues without it",
            )

    def _patience_s(self) -> float:
        """Time limit of the call that the thread is making now."""
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
                return  # abandoned by `close`
            what = "couldn't be closed"
            self._busy_since_s, self._sink_is_closing = time.monotonic(), True
            self._sink.close(self._error)
        except Exception as error:  # noqa: BLE001  # a failing tracker must not end the run
            self._give_up(what, error)

    def _serve(self, sink: OpenedSink) -> None:
        """Process the queue until it is closed.

        Raises:
            Exception: The sink's error, after a lost connection or several failures in a row.
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
                    type(error).__name__, f"a value it can't log was left out: {error!r:.300}"
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
            self._warn_once(
                "disabled", f"{what} and is disabled for the rest of the run: {error!r:.500}"
            )
