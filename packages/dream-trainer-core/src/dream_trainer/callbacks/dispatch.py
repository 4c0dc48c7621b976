"""Hook dispatch: one function per hook, compiled again when the collection changes.

A hook that no callback overrides costs a call of an empty function; each callback costs a call of
its bound method. An error gets a note that names the callback and the hook.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any

from dream_trainer.callbacks.callback import HOOKS, Callback


class Call:
    """A bound method of a callback; a note on its errors names the callback.

    Args:
        name: The callback's name in its collection.
        callback: The callback.
        hook: Name of the method.
        guarded: Make collectives an error inside.
    """

    def __init__(self, name: str, callback: Callback[Any], hook: str, *, guarded: bool) -> None:
        self.name = name
        self.hook = hook
        self.callback = callback
        self._guarded = guarded
        method: Callable[..., Any] = getattr(callback, hook)
        # `_note_call_of` finds a call by its method, so two callbacks mustn't share a function.
        self.method: Callable[..., Any] = (
            method if isinstance(method, MethodType) else partial(method)
        )
        if guarded:
            self.method = self._guard(self.method)

    def __call__(self, *args: Any) -> Any:
        try:
            return self.method(*args)
        except BaseException as error:
            self.note(error)
            raise

    def note(self, error: BaseException) -> None:
        """Add a note to an error: callback, hook, rank and step."""
        trainer = getattr(self.callback, "trainer", None)
        where = (
            ""
            if trainer is None
            else (
                f" on rank {trainer.world.rank} at step {trainer.global_step}"
                f" (epoch {trainer.current_epoch})"
            )
        )
        error.add_note(f"raised in {self.name}.{self.hook}{where}")

    def context(self) -> contextlib.AbstractContextManager[None]:
        """The context manager that a context hook returns.

        Raises:
            TypeError: If it returns something else.
        """
        context = self()
        if not isinstance(context, contextlib.AbstractContextManager):
            error = TypeError(
                f"{self.name}.{self.hook} returned a {type(context).__qualname__}; a context "
                "manager is required: decorate it with @contextlib.contextmanager"
            )
            self.note(error)
            raise error
        return _Context(context, self)

    def call_guarded(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call a method of the returned context manager, guarded as the hook is."""
        return (self._guard(method) if self._guarded else method)(*args)

    def _guard(self, method: Callable[..., Any]) -> Callable[..., Any]:
        where = f"{self.name}.{self.hook} of a RankZeroCallback"

        def guarded(*args: Any) -> Any:
            with self.callback.trainer.world.no_collectives(where):
                return method(*args)

        return guarded


def compiled(hook: str, calls: Sequence[Call], *, is_context: bool) -> Callable[..., Any] | None:
    """A function that makes the calls in order; None for a context hook without calls."""
    if is_context:
        return _nested_contexts(calls) if calls else None
    replaces_batch = HOOKS[hook][:1] == ("batch",)
    if not calls:
        return _keep_batch if replaces_batch else _do_nothing
    if replaces_batch:
        return _replacing_batch(calls)
    return _calling_in_step(calls) if len(HOOKS[hook]) == 2 else _calling(calls)


def _keep_batch(batch: Any, batch_idx: int) -> Any:
    return batch


def _do_nothing(*args: Any) -> None:
    pass


def _calling(calls: Sequence[Call]) -> Callable[..., None]:
    def call_all(*args: Any) -> None:
        for call in calls:
            call(*args)

    return call_all


# The hooks of a step have two arguments. Their loops run over bare methods inside one `try`, since
# `call(*args)` takes 3 times as long, and forwarding `*args` 1.5 times.


def _calling_in_step(calls: Sequence[Call]) -> Callable[[Any, Any], None]:
    methods = tuple(call.method for call in calls)

    def call_all(first: Any, second: Any) -> None:
        method = methods[0]
        try:
            for method in methods:
                method(first, second)
        except BaseException as error:
            _note_call_of(method, calls, error)
            raise

    return call_all


def _replacing_batch(calls: Sequence[Call]) -> Callable[[Any, int], Any]:
    methods = tuple(call.method for call in calls)

    def call_all(batch: Any, batch_idx: int) -> Any:
        method = methods[0]
        try:
            for method in methods:
                replacement = method(batch, batch_idx)
                if replacement is not None:
                    batch = replacement
        except BaseException as error:
            _note_call_of(method, calls, error)
            raise
        return batch

    return call_all


def _note_call_of(method: Callable[..., Any], calls: Sequence[Call], error: BaseException) -> None:
    next(call for call in calls if call.method is method).note(error)


def _nested_contexts(
    calls: Sequence[Call],
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    if len(calls) == 1:
        return calls[0].context

    @contextlib.contextmanager
    def nested() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for call in calls:
                stack.enter_context(call.context())
            yield

    return nested


_STEP_IN = {"train_context": "training_step", "validation_context": "validation_step"}


class _Context(contextlib.AbstractContextManager[None]):
    """A callback's context: notes name the callback in its errors; it can't suppress others."""

    def __init__(self, context: contextlib.AbstractContextManager[Any], call: Call) -> None:
        self._context = context
        self._call = call

    def __enter__(self) -> None:
        try:
            self._call.call_guarded(self._context.__enter__)
        except BaseException as error:
            self._call.note(error)
            raise

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            suppresses = self._call.call_guarded(self._context.__exit__, kind, error, traceback)
        except BaseException as new:
            if new is not error:
                self._call.note(new)
            raise
        if suppresses and error is not None:
            raise RuntimeError(
                f"{self._call.name}.{self._call.hook} suppressed an error of "
                f"{_STEP_IN[self._call.hook]} ({error!r}), so there is no result; let errors "
                "through: return None from __exit__"
            ) from error
