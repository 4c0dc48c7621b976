"""Coordination: collective calls in which an error of one rank is raised on all."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dream_trainer.world import cpu_collectives
from dream_trainer.world.daemon_thread import call_in_daemon_thread
from dream_trainer.world.rank_mismatch import by_value, disagreements, value_digest

if TYPE_CHECKING:
    from dream_trainer.world.world import World

T = TypeVar("T")
R = TypeVar("R")

_HEARTBEAT_S = 1.0
"""Interval at which ranks exchange whether their threads are done."""

_MAX_ERRORS = 4
"""Number of different errors that a message shows."""

# First byte of a report. A result follows, the text of an error, or the text of an error that was
# raised on all ranks and names them.
_RESULT, _ERROR, _ERROR_OF_ALL = b"\0", b"\1", b"\2"


class RankFailure(RuntimeError):
    """A function failed on some ranks; raised on all of them.

    The message has the errors and, in a world of several ranks, names the ranks. On a rank that
    failed, `__cause__` is its own error.
    """


class RankDisagreement(RankFailure, ValueError):
    """Ranks have different values where all must have the same; raised on all of them."""


def error_text(error: BaseException) -> str:
    """The message of an error, after its type unless it is a ValueError with a message."""
    text = str(error)
    if isinstance(error, ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Coordination:
    """Collective calls on a CPU group, without device sync.

    Every method is collective: each rank must call it. An `Exception` on one rank is raised on all
    of them, with that rank's message; so is the error of a result that can't be pickled. In a world
    of one nothing is sent or pickled, nor in a simulated one, whose other ranks do what this one
    does.

    Args:
        world: Launched.
        kind: Name of the group, as in `world.group`. Two threads must not use one group at the
            same time: give each thread its own.
        raises: Class of the error that is raised on all ranks.
        describe: Returns the text for the error of one rank.
    """

    def __init__(
        self,
        world: World,
        kind: str = "control",
        *,
        raises: type[RankFailure] = RankFailure,
        describe: Callable[[Exception], str] = error_text,
    ) -> None:
        self.rank = world.rank
        self.world_size = world.world_size
        self._use_device = world.use_device
        self._group = world.group(kind)
        self._raises = raises
        self._describe = describe

    @property
    def is_global_zero(self) -> bool:
        return self.rank == 0

    def each(self, function: Callable[[], T]) -> T:
        """Call a function on each rank and return this rank's result.

        Unless it fails, ranks exchange 8 bytes.

        Raises:
            RankFailure: On all ranks, if the function raised on one.
        """
        return self._result(self._outcome(function))

    def each_without_timeout(self, function: Callable[[], T]) -> T:
        """As `each`, for a function that may exceed the timeout of collectives.

        It runs in a thread, while the ranks exchange a heartbeat once a second.

        Raises:
            RankFailure: On all ranks, if the function raised on one.
        """
        if self._group is None:
            return self.each(function)

        def in_thread() -> T:
            self._use_device()
            return function()

        future: Future[_Outcome[T]]
        future = call_in_daemon_thread("each-without-timeout", self._outcome, in_thread)
        while True:
            wait([future], _HEARTBEAT_S)
            if cpu_collectives.is_true_on_all(future.done(), self._group):
                return self._result(future.result())

    def gather(self, function: Callable[[], T]) -> list[T]:
        """Call a function on each rank and return all results, by rank.

        Raises:
            RankFailure: On all ranks, if the function raised on one.
        """
        if self._group is None:
            return [self.each(function)] * self.world_size
        outcome = self._outcome(lambda: pickle.dumps(function()))
        reports = cpu_collectives.gathered_bytes(self._report(outcome), self._group)
        self._raise_errors(reports, outcome.error)
        return [_unpickled(report) for report in reports]

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 and return its result on all ranks.

        Raises:
            RankFailure: On all ranks, if the function raised.
        """
        if self._group is None:
            return self.each(function)
        report, error, results = b"", None, []
        if self.is_global_zero:

            def pickled() -> bytes:
                results.append(function())
                return pickle.dumps(results[0])

            outcome = self._outcome(pickled)
            report, error = self._report(outcome), outcome.error
        report = cpu_collectives.broadcast_bytes(report, 0, self._group)
        self._raise_errors([report], error)
        return results[0] if self.is_global_zero else _unpickled(report)

    def via_rank_zero(self, value: T, function: Callable[[Sequence[T]], Sequence[R]]) -> R:
        """Gather values on rank 0, call a function there, and scatter its results.

        Args:
            value: This rank's value; must be picklable.
            function: Called on rank 0 with the values of all ranks, by rank; returns one answer
                per rank, by rank.

        Raises:
            RankFailure: On all ranks, if the function raised.
        """
        if self._group is None:
            values = [value] * self.world_size
            return self.each(lambda: self._answers(function, values)[self.rank])
        sent = self._outcome(lambda: pickle.dumps(value))
        reports = cpu_collectives.gathered_bytes_on_zero(self._report(sent), self._group)
        answers, error = None, None
        if reports is not None:
            answers, error = self._answer_reports(reports, function)
        answer = cpu_collectives.scattered_bytes(answers, self._group)
        self._raise_errors([answer], sent.error or error)
        return _unpickled(answer)  # type: ignore[no-any-return]  # what the function returned

    def agree(self, values: Mapping[Any, Any]) -> None:
        """Check that all ranks have the same values. Sends digests; the values if they differ.

        Args:
            values: Values by name, for the error. Compared by `==`; must be picklable.

        Raises:
            RankDisagreement: On all ranks, if some differ; it shows the values by rank. A
                ValueError.
        """
        mine = dict(values)
        if self._group is None or self._have_one_digest(mine):
            return
        # Equal values may have different digests, so the values decide.
        all_values = self.gather(lambda: mine)
        if any(each != all_values[0] for each in all_values):
            raise RankDisagreement(disagreements(all_values))

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any rank has, sorted. Sends digests; the names if they differ."""
        mine = sorted(names)
        if self._group is None or self._have_one_digest(mine):
            return mine
        return sorted({name for theirs in self.gather(lambda: mine) for name in theirs})

    def _have_one_digest(self, value: Any) -> bool:
        """Whether the digests of all ranks are equal; False if one has none. One exchange."""
        outcome = self._outcome(lambda: value_digest(value))
        words = struct.unpack("4q", outcome.result) if outcome.error is None else (0,) * 4
        has_none = outcome.error is not None
        # The largest of ~word is ~ of the smallest word.
        *extremes, one_has_none = cpu_collectives.maxima(
            [*words, *(~word for word in words), has_none], self._group
        )
        return not one_has_none and all(
            largest == ~smallest
            for largest, smallest in zip(extremes[:4], extremes[4:], strict=True)
        )

    def _answer_reports(
        self, reports: Sequence[bytes], function: Callable[[Sequence[T]], Sequence[R]]
    ) -> tuple[list[bytes], Exception | None]:
        """Rank 0's report to each rank, with the answers or an error, and its own error."""
        message = self._message(reports)
        if message is not None:
            return [_ERROR_OF_ALL + _encoded(message)] * self.world_size, None
        outcome = self._outcome(
            lambda: [
                _RESULT + pickle.dumps(answer)
                for answer in self._answers(function, [_unpickled(report) for report in reports])
            ]
        )
        if outcome.error is None:
            return outcome.result, None
        return [self._error_report(outcome.error)] * self.world_size, outcome.error

    def _answers(
        self, function: Callable[[Sequence[T]], Sequence[R]], values: Sequence[T]
    ) -> Sequence[R]:
        answers = function(values)
        if len(answers) != self.world_size:
            raise ValueError(
                f"there are {len(answers)} answers for {self.world_size} ranks; the function must "
                "return one for each rank"
            )
        return answers

    def _outcome(self, function: Callable[[], T]) -> _Outcome[T]:
        try:
            return _Outcome(function(), None)
        except Exception as error:  # noqa: BLE001  # raised on all ranks
            return _Outcome(None, error)  # type: ignore[arg-type]  # not read after an error

    def _result(self, outcome: _Outcome[T]) -> T:
        report = b"" if outcome.error is None else self._error_report(outcome.error)
        reports = cpu_collectives.gathered_bytes(report, self._group)
        self._raise_errors(reports, outcome.error)
        return outcome.result

    def _report(self, outcome: _Outcome[bytes]) -> bytes:
        return (
            _RESULT + outcome.result if outcome.error is None else self._error_report(outcome.error)
        )

    def _error_report(self, error: Exception) -> bytes:
        if isinstance(error, RankFailure):
            return _ERROR_OF_ALL + _encoded(str(error))
        return _ERROR + _encoded(self._describe(error))

    def _raise_errors(self, reports: Sequence[bytes], own: Exception | None) -> None:
        message = self._message(reports)
        if message is not None:
            raise self._raises(message) from own

    def _message(self, reports: Sequence[bytes]) -> str | None:
        """The message for all errors in the reports; None if there is none."""
        single: dict[int, str] = {}
        of_all: dict[str, None] = {}
        for rank, report in enumerate(reports):
            text = report[1:].decode(errors="surrogatepass") if report[:1] != _RESULT else ""
            if report[:1] == _ERROR:
                single[self.rank if self._group is None else rank] = text
            elif report[:1] == _ERROR_OF_ALL:
                of_all[text] = None
        found = [*of_all, *(by_value(single) if self.world_size > 1 else single.values())]
        more = len(found) - _MAX_ERRORS
        shown = "; ".join(found[:_MAX_ERRORS]) + (f"; and {more} more" if more > 0 else "")
        return shown if found else None


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """The result or the error of a function."""

    result: T
    error: Exception | None


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _unpickled(report: bytes) -> Any:
    # From this run's own ranks, which run the same code.
    return pickle.loads(memoryview(report)[1:])  # noqa: S301
