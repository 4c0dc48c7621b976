"""CallbackCollection: names, order, dispatch and state of a run's callbacks."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, overload

from dream_trainer.callbacks.callback import CONTEXTS, HOOKS, Callback, RankZeroCallback
from dream_trainer.callbacks.dispatch import Call, compiled
from dream_trainer.callbacks.order import Plan, ordered
from dream_trainer.callbacks.requirements import lacking
from dream_trainer.callbacks.values import not_plain, without_rank_local

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from dream_trainer.trainer.abstract import AbstractTrainer

logger = logging.getLogger(__name__)

_AnyCallback = Callback[Any]
_Context = Callable[[], contextlib.AbstractContextManager[Any]] | None


class CallbackCollection:
    """The callbacks of a trainer: a mapping from name to callback that can be called by hook.

    `collection.post_train_step(result, batch_idx)` calls the callbacks that override that hook,
    in order. Any change takes effect from the next hook on, also when a hook makes it.

    Args:
        callbacks: Callbacks, or names and callbacks. A callback without a name gets that of its
            class; a second one of a class gets a number, as in "EMACallback_2".

    Raises:
        TypeError: If something isn't a Callback.
        ValueError: If a name or a callback is given twice, or `before` and `after` of the
            callbacks contradict each other.
    """

    # One for each hook, compiled by refresh(): it calls whoever overrides the hook.
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
    # None where nobody has a context, so that a step needn't enter one.
    train_context: _Context
    validation_context: _Context
    # These two go on after an error, hence the methods of their names.
    _on_exception_calls: list[Call]
    _post_fit_calls: list[Call]

    def __init__(
        self,
        callbacks: (
            Mapping[str, _AnyCallback] | Iterable[_AnyCallback | tuple[str, _AnyCallback]]
        ) = (),
    ) -> None:
        self._callbacks: dict[str, _AnyCallback] = {}
        self._trainer: AbstractTrainer | None = None
        self._began_fit: set[int] = set()  # ids: a callback needn't be hashable
        self._unclaimed_states: dict[str, Any] = {}
        for item in callbacks.items() if isinstance(callbacks, Mapping) else callbacks:
            name, callback = item if isinstance(item, tuple) else (None, item)
            self._callbacks[self._checked(callback, name)] = callback
        self.refresh()

    # Attaching

    def initialize(self, trainer: AbstractTrainer) -> None:
        """Attach all callbacks to a trainer.

        Raises:
            TypeError: If the trainer lacks what a callback requires; nothing is attached then.
            RuntimeError: If the callbacks are at work in another trainer.
        """
        if self._trainer not in (None, trainer) and self._began_fit:
            raise RuntimeError(
                "these callbacks are at work in another trainer that is in fit(); "
                "give this trainer its own, for example copy.deepcopy(callbacks)"
            )
        for name, callback in self._callbacks.items():
            _refuse_unmet_requirements(name, callback, trainer)
        self._trainer = trainer
        self.refresh()

    def refresh(self) -> None:
        """Sort the callbacks and compile the hooks again; every change of the collection does so.

        Call it after giving a callback a new hook, or assigning `before` or `after`.

        Raises:
            ValueError: If `before` and `after` contradict each other.
        """
        order = ordered(self._callbacks)
        is_global_zero = self._trainer is None or self._trainer.world.is_global_zero
        debug = self._trainer is not None and self._trainer.config.debug
        for callback in self._callbacks.values():
            if self._trainer is not None:
                callback.trainer = self._trainer
        for hook in HOOKS:
            calls = [
                Call(name, callback, hook, guarded=debug and isinstance(callback, RankZeroCallback))
                for name, callback in ((name, self._callbacks[name]) for name in order)
                if (is_global_zero or not isinstance(callback, RankZeroCallback))
                and (_overrides(callback, hook) or hook in ("pre_fit", "post_fit"))
            ]
            if hook == "pre_fit":
                self.pre_fit = self._pre_fit_of(calls)
            elif hook in ("post_fit", "on_exception"):
                setattr(self, f"_{hook}_calls", calls)
            else:
                setattr(self, hook, compiled(hook, calls, is_context=hook in CONTEXTS))

    def plan(self) -> Plan:
        """Which callback runs in which hook, in which order; print it for a table."""
        names = ordered(self._callbacks)
        hooks = {
            hook: tuple(name for name in names if _overrides(self._callbacks[name], hook))
            for hook in HOOKS
        }
        return Plan(
            hooks={hook: names for hook, names in hooks.items() if names},
            rank_zero=frozenset(
                name
                for name, callback in self._callbacks.items()
                if isinstance(callback, RankZeroCallback)
            ),
        )

    # The two hooks that run for every callback, whatever the others do

    def on_exception(self, exception: BaseException) -> None:
        """Tell every callback of an error; what they raise themselves is logged."""
        _run_all(self._on_exception_calls, exception)

    def post_fit(self) -> BaseException | None:
        """Let every callback whose `pre_fit` ran clean up.

        Returns:
            The first error that one of them raised; all errors are logged.
        """
        calls = [call for call in self._post_fit_calls if id(call.callback) in self._began_fit]
        try:
            return _run_all(calls)
        finally:
            self._began_fit.clear()

    def _pre_fit_of(self, calls: list[Call]) -> Callable[[], None]:
        def pre_fit() -> None:
            for call in calls:
                call()
                self._began_fit.add(id(call.callback))

        return pre_fit

    # State

    def state_dict(self) -> dict[str, Any]:
        """States of the callbacks that have one, by name; also those that nobody claimed.

        Raises:
            TypeError: If a state holds what a checkpoint couldn't be loaded with; it names the
                callback and the place in its state.
        """
        states = dict(self._unclaimed_states)
        for name, callback in self._stateful():
            state = callback.state_dict()
            foreign = next(not_plain(state), None)
            if foreign is not None:
                path, value = foreign
                raise TypeError(
                    f"the state of callback {name} holds a {type(value).__qualname__} at "
                    f"state_dict(){path}, which a safe checkpoint can't hold; return plain data: "
                    "numbers, strings, bytes, tensors, and lists, tuples, sets and dicts of them"
                )
            states[name] = state
        return states

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        trainer: AbstractTrainer | None = None,
        *,
        strict: bool = False,
    ) -> None:
        """Give each callback the state that was saved under its name.

        A state that belongs to nobody is kept and saved again.

        Args:
            state_dict: What `state_dict` returned.
            trainer: Passed on to the callbacks. Default: the one they are attached to.
            strict: Raise instead of warning if names don't match.

        Raises:
            KeyError: If `strict` and a state has no callback, or a callback with a state none.
        """
        callbacks = dict(self._stateful())
        unknown = sorted(set(state_dict) - set(self._callbacks))
        missing = sorted(set(callbacks) - set(state_dict))
        if unknown or missing:
            message = (
                f"states were saved for {_listed(state_dict)}, and the callbacks with a state are "
                f"{_listed(callbacks)}: {_listed(unknown)} will be kept for a later run, and "
                f"{_listed(missing)} will start afresh; give callbacks the names they had"
            )
            if strict:
                raise KeyError(message)
            warnings.warn(message, stacklevel=2)
        self._unclaimed_states = {name: state_dict[name] for name in unknown}
        for name, callback in callbacks.items():
            if name in state_dict:
                state = without_rank_local(state_dict[name])
                if _takes_trainer(callback.load_state_dict):
                    callback.load_state_dict(state, trainer or self._trainer)
                else:
                    callback.load_state_dict(state)  # type: ignore[call-arg]  # left out

    def _stateful(self) -> Iterator[tuple[str, _AnyCallback]]:
        """Callbacks of this rank that have a state."""
        is_global_zero = self._trainer is None or self._trainer.world.is_global_zero
        for name, callback in self._callbacks.items():
            if _overrides(callback, "state_dict") or _overrides(callback, "load_state_dict"):
                if is_global_zero or not isinstance(callback, RankZeroCallback):
                    yield name, callback

    # The mapping. Iteration gives the callbacks, not their names.

    def append(self, callback: _AnyCallback, name: str | None = None) -> None:
        """Add a callback at the end.

        Raises:
            TypeError: If it isn't a Callback, or the trainer lacks what it requires.
            ValueError: If the name is taken, or the callback is here already.
        """
        self._change(lambda callbacks: callbacks.update({self._checked(callback, name): callback}))

    def __getitem__(self, name: str) -> _AnyCallback:
        try:
            return self._callbacks[name]
        except KeyError:
            raise KeyError(
                f"no callback is called {name!r}; there are {_listed(self._callbacks)}"
            ) from None

    def __setitem__(self, name: str, callback: _AnyCallback) -> None:
        if self._callbacks.get(name) is not callback:
            self._checked(callback, None)
            self._change(lambda callbacks: callbacks.update({name: callback}))

    def __delitem__(self, name: str) -> None:
        self[name]  # a clear error if it isn't there
        self._change(lambda callbacks: callbacks.pop(name))

    def __contains__(self, item: object) -> bool:
        if isinstance(item, str):
            return item in self._callbacks
        return any(callback is item for callback in self._callbacks.values())

    def __len__(self) -> int:
        return len(self._callbacks)

    def __iter__(self) -> Iterator[_AnyCallback]:
        return iter(tuple(self._callbacks.values()))

    def __ior__(self, other: CallbackCollection | Mapping[str, _AnyCallback]) -> CallbackCollection:
        self.update(other)
        return self

    def __repr__(self) -> str:
        inside = ", ".join(f"{name!r}: {cb!r}" for name, cb in self._callbacks.items())
        return f"CallbackCollection({{{inside}}})"

    def keys(self) -> Iterable[str]:
        return tuple(self._callbacks)

    def values(self) -> Iterable[_AnyCallback]:
        return tuple(self._callbacks.values())

    def items(self) -> Iterable[tuple[str, _AnyCallback]]:
        return tuple(self._callbacks.items())

    @overload
    def get(self, name: str) -> _AnyCallback | None: ...
    @overload
    def get(self, name: str, default: _AnyCallback) -> _AnyCallback: ...
    def get(self, name: str, default: _AnyCallback | None = None) -> _AnyCallback | None:
        return self._callbacks.get(name, default)

    def pop(self, name: str, *default: _AnyCallback | None) -> Any:
        if default and name not in self._callbacks:
            return default[0]
        callback = self[name]
        del self[name]
        return callback

    def setdefault(self, name: str, callback: _AnyCallback) -> _AnyCallback:
        if name not in self._callbacks:
            self[name] = callback
        return self._callbacks[name]

    def update(self, other: CallbackCollection | Mapping[str, _AnyCallback]) -> None:
        for name, callback in other.items():
            self[name] = callback

    def clear(self) -> None:
        self._change(lambda callbacks: callbacks.clear())

    def __getstate__(self) -> dict[str, Any]:
        # Compiled hooks can't be pickled, and a copy belongs to no trainer.
        return {"callbacks": self._callbacks, "unclaimed_states": self._unclaimed_states}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CallbackCollection.__init__(self, state["callbacks"])
        self._unclaimed_states = state["unclaimed_states"]

    def _change(self, change: Callable[[MutableMapping[str, _AnyCallback]], object]) -> None:
        """Change a copy of the callbacks and take it over if all can be sorted and attached."""
        before = self._callbacks
        after = dict(before)
        change(after)
        newcomers = {name: cb for name, cb in after.items() if before.get(name) is not cb}
        if self._trainer is not None:
            for name, callback in newcomers.items():
                _refuse_unmet_requirements(name, callback, self._trainer)
        ordered(after)
        self._callbacks = after
        if self._began_fit:
            self._began_fit.update(map(id, newcomers.values()))
        self.refresh()

    def _checked(self, callback: object, name: str | None) -> str:
        """The name under which a new callback can be added."""
        if not isinstance(callback, Callback):
            hint = "; make one: write ()" if isinstance(callback, type) else ""
            raise TypeError(
                f"{callback!r} is a {type(callback).__qualname__}, not a Callback{hint}"
            )
        for other_name, other in self._callbacks.items():
            if other is callback:
                raise ValueError(
                    f"this {type(callback).__name__} is in the collection already, as "
                    f"{other_name!r}; make a second one"
                )
        if name in self._callbacks:
            raise ValueError(
                f"a callback is called {name!r} already ({self._callbacks[name]!r}); "
                f"give this one another name, or assign collection[{name!r}] to replace it"
            )
        if name is not None:
            return name
        base = type(callback).__name__
        candidates = (base if n == 1 else f"{base}_{n}" for n in range(1, len(self._callbacks) + 2))
        return next(candidate for candidate in candidates if candidate not in self._callbacks)


def _overrides(callback: _AnyCallback, name: str) -> bool:
    """Whether a callback has a method of its own, by identity."""
    method = getattr(callback, name)
    return getattr(method, "__func__", method) is not getattr(Callback, name)


def _refuse_unmet_requirements(name: str, callback: _AnyCallback, trainer: AbstractTrainer) -> None:
    missing = lacking(trainer, callback.requirements())
    if missing:
        names = ", ".join(cls.__name__ for cls in missing)
        raise TypeError(
            f"callback {name} needs a trainer with {names}, and {type(trainer).__name__} isn't "
            f"one; derive {type(trainer).__name__} from {names}, or leave the callback out"
        )


def _run_all(calls: Iterable[Call], *args: Any) -> BaseException | None:
    """Make every call, whatever the others raise; log the errors and return the first."""
    first: BaseException | None = None
    for call in calls:
        try:
            call(*args)
        except BaseException as error:  # nothing may keep the others from cleaning up
            logger.error("%s.%s failed during clean-up", call.name, call.hook, exc_info=error)
            first = first or error
    return first


def _takes_trainer(load_state_dict: Callable[..., Any]) -> bool:
    try:
        inspect.signature(load_state_dict).bind({}, None)
    except TypeError:
        return False
    return True


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
