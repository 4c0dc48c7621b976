"""Conformance checks for callbacks: real runs of a tiny trainer.

All checks in one test::

    def test_my_callback_conforms() -> None:
        check_callback(lambda: MyCallback(every=Every(steps=2)))

or one test per check::

    @pytest.mark.parametrize("check", CHECKS, ids=str)
    def test_my_callback(check: Check, tmp_path: Path) -> None:
        check(MyCallback, tmp_path)
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from dream_trainer.testing import checks
from dream_trainer.testing.checks import Make, Subject
from dream_trainer.testing.trainers import TinyTrainer


@dataclass(frozen=True)
class Check:
    """A rule for callbacks, and its check."""

    body: Callable[[Subject], None]

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return self.body.__name__

    @property
    def rule(self) -> str:
        """The rule in words."""
        return self.body.__doc__ or ""

    def __call__(
        self,
        make: Make,
        folder: Path,
        *,
        trainer_class: type[TinyTrainer] = TinyTrainer,
        changes_training: bool = False,
    ) -> None:
        """Check a callback.

        Args:
            make: Returns a new instance on each call; may be a class or a lambda.
            folder: Runs write below it.
            trainer_class: A trainer that meets the callback's requirements.
            changes_training: Whether it may change the trained weights or draw random numbers.

        Raises:
            AssertionError: If it breaks the rule; an error of the callback itself is the cause.
        """
        subject = Subject(
            make=make,
            folder=folder,
            trainer_class=trainer_class,
            changes_training=changes_training,
        )
        try:
            with contextlib.chdir(folder):
                self.body(subject)
        except (Exception, SystemExit) as error:
            found = str(error) if type(error) is AssertionError else repr(error)
            raise AssertionError(f"{self.name}: {self.rule} {found}") from error


CHECKS: tuple[Check, ...] = (
    Check(checks.constructs),
    Check(checks.plans),
    Check(checks.trains),
    Check(checks.trains_twice),
    Check(checks.state_round_trip),
    Check(checks.copies),
    Check(checks.pickles),
    Check(checks.survives_errors),
    Check(checks.leaves_nothing_behind),
    Check(checks.stops),
    Check(checks.rank_zero_hooks_call_no_collective),
    Check(checks.works_on_two_ranks),
)
"""All checks, in reading order."""


def check_callback(
    make: Make,
    *,
    trainer_class: type[TinyTrainer] = TinyTrainer,
    changes_training: bool = False,
    skip: Collection[str] = (),
) -> None:
    """Run all checks on a callback; takes a few seconds.

    Args:
        make: Returns a new instance on each call; may be a class or a lambda.
        trainer_class: A trainer that meets the callback's requirements.
        changes_training: Whether it may change the trained weights or draw random numbers.
        skip: Names of checks to leave out.

    Raises:
        AssertionError: If it breaks a rule; it lists all broken rules.
        ValueError: If a name in `skip` is no check.
    """
    unknown = sorted(set(skip) - set(map(str, CHECKS)))
    if unknown:
        names = ", ".join(map(str, CHECKS))
        raise ValueError(f"no check is called {unknown[0]!r}; there are {names}")
    failures: list[AssertionError] = []
    for check in (check for check in CHECKS if check.name not in skip):
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(
                    make,
                    Path(folder),
                    trainer_class=trainer_class,
                    changes_training=changes_training,
                )
            except AssertionError as failure:
                failures.append(failure)
    if failures:
        report = "\n".join(f"- {failure}" for failure in failures)
        message = f"{len(failures)} of {len(CHECKS)} checks failed:\n{report}"
        raise AssertionError(message) from failures[0]
