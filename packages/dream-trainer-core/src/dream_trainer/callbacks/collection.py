"""CallbackCollection: attaches callbacks to a trainer and calls their hooks in order."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

from dream_trainer.callbacks.callback import CONTEXTS, HOOKS, Callback, RankZeroCallback
from dream_trainer.callbacks.callback_state import load_state, state_of
from dream_trainer.callbacks.dispatch import Call, compiled
from dream_trainer.callbacks.named import NamedCallbacks, joined_names
from dream_trainer.callbacks.order import Plan, ordered
from dream_trainer.callbacks.requirements import missing_requirements

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from dream_trainer.interface.trainer import AbstractTrainer

logger = logging.getLogger(__name__)

_AnyCallback = Callback[Any]
_Context = Callable[[], contextlib.AbstractContextManager[Any]] | None


class CallbackCollection(NamedCallbacks):
    """The callbacks of a trainer: a mapping from name to callback, with a method per hook.

    `collection.post_train_step(result, batch_idx)` calls the callbacks that override that hook,
    in order.

    A change takes effect from the next hook on, also if a hook makes it. A callback that is added
    while `fit` runs misses earlier hooks: if it has a `pre_fit`, its `post_fit` isn't called
    either. A removed one isn't called any more, `post_fit` included.

    Args:
        callbacks: Callbacks, or names and callbacks. Without a name, a callback gets the name
            of its class; a second one of that class gets a number, as in "EMACallback_2".

    Raises:
        TypeError: If a value isn't a Callback, a name isn't a string, or the trainer lacks what
            a callback requires.
        ValueError: If a name or a callback is given twice, or `before` and `after` of the
            callbacks contradict each other.
        RuntimeError: If a callback is in use by another trainer that is in fit().
    """

    # One per hook, compiled by refresh(): calls the callbacks that override it.
    pre_launch: Callable[[], None]
    pre_configure: Callable[[], None]
    post_configure: Callable[[], None]
    pre_setup: Callable[[], None]
    post_setup: Callable[[], None]
    pre_fit: Callable[[], None]
    pre_epoch: Callable[[], None]
    post_epoch: Callable[[], None]
    pre_train_epoch: Callable[[], None]
    post_train_epoch: Callable[[dict[str, Any]], None]
    pre_train_step: Callable[[Any, int], Any]
    post_train_step: Callable[[dict[str, Any], int], None]
    pre_optimizer_step: Callable[[nn.Module, Optimizer], None]
    post_optimizer_step: Callable[[nn.Module, Optimizer], None]
    pre_optimizer_zero_grad: Callable[[nn.Module, Optimizer], None]
    post_optimizer_zero_grad: Callable[[nn.Module, Optimizer], None]
    pre_validation_epoch: Callable[[], None]
    post_validation_epoch: Callable[[dict[str, Any]], None]
    pre_validation_step: Callable[[Any, int], Any]
    post_validation_step: Callable[[dict[str, Any], int], None]
    # None if no callback has a context, so that a step needn't enter one.
    train_context: _Context
    validation_context: _Context
    # These two continue after an error; see the methods on_exception and post_fit.
    _on_exception_calls: list[Call]
    _post_fit_calls: list[Call]

    # Two overloads: mypy can't infer the type of a dict literal for a union with Iterable.
    @overload
    def __init__(self, callbacks: Mapping[str, _AnyCallback]) -> None: ...
    @overload
    def __init__(
        self, callbacks: Iterable[_AnyCallback | tuple[str, _AnyCallback]] = ()
    ) -> None: ...
    def __init__(
        self,
        callbacks: (
            Mapping[str, _AnyCallback] | Iterable[_AnyCallback | tuple[str, _AnyCallback]]
        ) = (),
    ) -> None:
        self._trainer: AbstractTrainer | None = None
        self._is_fitting = False
        self._began_fit: dict[int, _AnyCallback] = {}  # by id: a callback needn't be hashable
        self._unclaimed_states: dict[str, Any] = {}
        super().__init__(callbacks)

    # Attaching

    def initialize(self, trainer: AbstractTrainer) -> None:
        """Attach all callbacks to a trainer.

        Raises:
            TypeError: If the trainer lacks what a callback requires; nothing is attached then.
            RuntimeError: If a callback is in use by another trainer that is in fit().
        """
        for name, callback in self._callbacks.items():
            _refuse_unattachable(name, callback, trainer)
        self._trainer = trainer
        self.refresh()

    def refresh(self) -> None:
        """Sort the callbacks and compile the hooks; every change of the collection calls it.

        Call it after assigning a hook, `before` or `after` of a callback.

        Raises:
            ValueError: If `before` and `after` contradict each other.
        """
        order = ordered(self._callbacks)
        if self._trainer is not None:
            for callback in self._callbacks.values():
                callback.trainer = self._trainer
        here = [(name, self._callbacks[name]) for name in order]
        here = [(name, callback) for name, callback in here if self._runs_here(callback)]
        for hook in HOOKS:
            is_for_all = hook in ("pre_fit", "post_fit")  # pre_fit records which post_fit to call
            calls = [
                self._call(name, callback, hook)
                for name, callback in here
                if is_for_all or _overrides(callback, hook)
            ]
            if hook == "pre_fit":
                self.pre_fit = self._recording_pre_fit(calls)
            elif hook in ("post_fit", "on_exception"):
                setattr(self, f"_{hook}_calls", calls)
            else:
                setattr(self, hook, compiled(hook, calls, is_context=hook in CONTEXTS))

    def plan(self) -> Plan:
        """Which callbacks run in which hook, in order; prints as a table."""
        callbacks = {name: self._callbacks[name] for name in ordered(self._callbacks)}
        hooks = {
            hook: tuple(name for name, callback in callbacks.items() if _overrides(callback, hook))
            for hook in HOOKS
        }
        return Plan(
            hooks={hook: names for hook, names in hooks.items() if names},
            rank_zero=frozenset(
                name
                for name, callback in callbacks.items()
                if isinstance(callback, RankZeroCallback)
            ),
        )

    def _replace(self, after: dict[str, _AnyCallback]) -> None:
        added = {
            name: callback
            for name, callback in after.items()
            if self._callbacks.get(name) is not callback
        }
        if self._trainer is not None:
            for name, callback in added.items():
                _refuse_unattachable(name, callback, self._trainer)
        ordered(after)  # raises before anything has changed
        super()._replace(after)
        if self._is_fitting:
            for callback in added.values():
                if not _overrides(callback, "pre_fit"):
                    self._began_fit[id(callback)] = callback
        self.refresh()

    def _runs_here(self, callback: _AnyCallback) -> bool:
        is_global_zero = self._trainer is None or self._trainer.world.is_global_zero
        return is_global_zero or not isinstance(callback, RankZeroCallback)

    def _call(self, name: str, callback: _AnyCallback, method: str) -> Call:
        debug = self._trainer is not None and self._trainer.config.debug
        guarded = debug and isinstance(callback, RankZeroCallback)
        return Call(name, callback, method, guarded=guarded)

    # pre_fit, and the two hooks that run for every callback even if others fail

    @property
    def is_fitting(self) -> bool:
        """Whether `pre_fit` has begun and `post_fit` hasn't."""
        return self._is_fitting

    def on_exception(self, exception: BaseException) -> None:
        """Call `on_exception` of every callback; their own errors are logged."""
        _run_all(self._on_exception_calls, exception)

    def post_fit(self) -> BaseException | None:
        """Call `post_fit` of every callback whose `pre_fit` ran.

        Returns:
            The first error that was raised, if any; all errors are logged.
        """
        calls = [call for call in self._post_fit_calls if id(call.callback) in self._began_fit]
        self._is_fitting = False
        self._began_fit = {}
        return _run_all(calls)

    def _recording_pre_fit(self, calls: list[Call]) -> Callable[[], None]:
        def pre_fit() -> None:
            self._is_fitting = True
            for call in calls:
                call()
                self._began_fit[id(call.callback)] = call.callback

        return pre_fit

    # State

    def state_dict(self) -> dict[str, Any]:
        """States of callbacks by name, including loaded states without a callback.

        Raises:
            TypeError: If a state isn't a dict of plain data; it names the callback and the path.
        """
        states = {
            name: state_of(self._call(name, callback, "state_dict"))
            for name, callback in self._stateful().items()
            if self._runs_here(callback)
        }
        return {**self._unclaimed_states, **states}

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        trainer: AbstractTrainer | None = None,
        *,
        strict: bool = False,
    ) -> None:
        """Load each callback's state by its name.

        A state without a callback is kept and saved again.

        Args:
            state_dict: As returned by `state_dict`.
            trainer: Passed to the callbacks. Default: the trainer they are attached to.
            strict: Raise instead of warning if names don't match.

        Raises:
            KeyError: If `strict` and there is a state without callback, or a callback without its
                state.
        """
        stateful = self._stateful()
        unclaimed = [name for name in state_dict if name not in stateful]
        missing = [name for name in stateful if name not in state_dict]
        if unclaimed or missing:
            outcomes = [f"{joined_names(unclaimed)} will be kept for a later run"] * bool(unclaimed)
            outcomes += [f"{joined_names(missing)} will start without a state"] * bool(missing)
            message = (
                f"states were saved for {joined_names(state_dict)}, and the callbacks with a state "
                f"are {joined_names(stateful)}: {', and '.join(outcomes)}; give callbacks the "
                "names they were saved under"
            )
            if strict:
                raise KeyError(message)
            warnings.warn(message, stacklevel=2)
        self._unclaimed_states = {name: state_dict[name] for name in unclaimed}
        for name, callback in stateful.items():
            if name in state_dict and self._runs_here(callback):
                call = self._call(name, callback, "load_state_dict")
                load_state(call, state_dict[name], trainer or self._trainer)

    def _stateful(self) -> dict[str, _AnyCallback]:
        """Callbacks with a state, including those that don't run on this rank."""
        return {
            name: callback
            for name, callback in self._callbacks.items()
            if _overrides(callback, "state_dict") or _overrides(callback, "load_state_dict")
        }

    # Copies and pickles

    def __getstate__(self) -> dict[str, Any]:
        # Compiled hooks can't be pickled, and a copy isn't attached to a trainer.
        return {"callbacks": self._callbacks, "unclaimed_states": self._unclaimed_states}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CallbackCollection.__init__(self, state["callbacks"])
        self._unclaimed_states = state["unclaimed_states"]


def _overrides(callback: _AnyCallback, name: str) -> bool:
    """Whether a callback overrides a method, by identity."""
    method = getattr(callback, name)
    return getattr(method, "__func__", method) is not getattr(Callback, name)


def _refuse_unattachable(name: str, callback: _AnyCallback, trainer: AbstractTrainer) -> None:
    missing = missing_requirements(trainer, callback.requirements())
    if missing:
        names = ", ".join(cls.__name__ for cls in missing)
        raise TypeError(
            f"callback {name} needs a trainer with {names}, and {type(trainer).__name__} isn't "
            f"one; derive {type(trainer).__name__} from {names}, or leave the callback out"
        )
    other: AbstractTrainer = getattr(callback, "trainer", trainer)
    if other is not trainer and other.callbacks.is_fitting and callback in other.callbacks:
        raise RuntimeError(
            f"callback {name} is in use by another trainer that is in fit(); "
            "give this trainer its own copy, for example copy.deepcopy(callbacks)"
        )


def _run_all(calls: Iterable[Call], *args: Any) -> BaseException | None:
    """Make every call even if others raise; log the errors and return the first."""
    remaining = iter(calls)
    for call in remaining:
        try:
            call(*args)
        except BaseException as error:  # the others must clean up too
            if isinstance(error, Exception):  # Ctrl-C, SystemExit and interruptions aren't failures
                logger.error("%s.%s failed during clean-up", call.name, call.hook, exc_info=error)
            _run_all(
                remaining, *args
            )  # inside except: an interruption being handled isn't raised again
            return error
    return None
