"""Checks of a callback class when it is defined: hook names, signatures, order."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dream_trainer.callbacks.foreign_hooks import FOREIGN_HOOKS

_RESERVED_PREFIXES = ("pre_", "post_", "on_")
_STATE_METHODS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "state_dict": ((),),
    "load_state_dict": (("state_dict", "trainer"), ("state_dict",)),
}


def check_definition(cls: type, root: type, hooks: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a class whose hooks would never be called, or would fail.

    Args:
        cls: A new subclass of `root`.
        root: The class that declares the hooks, as methods that do nothing.
        hooks: Names of the arguments, by the hook's name.

    Raises:
        TypeError: If a hook is misspelt, hidden behind `root`, not a method or a coroutine or
            generator, if its signature can't take its arguments, or if `before` or `after` has
            an invalid entry.
    """
    calls = {**{hook: (arguments,) for hook, arguments in hooks.items()}, **_STATE_METHODS}
    _refuse_misspelt_hooks(cls, root, tuple(calls))
    for name, ways in calls.items():
        if getattr(cls, name) is getattr(root, name):
            _refuse_hidden_method(cls, root, name)
        else:
            _refuse_uncallable_method(cls, name, ways)
    for name in ("before", "after"):
        _refuse_invalid_constraints(cls, name)


def _refuse_misspelt_hooks(cls: type, root: type, names: tuple[str, ...]) -> None:
    inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
    for name, owner in _methods_to_check(cls, root):
        if name.startswith("_") or name in names or (owner is cls and name in inherited):
            continue
        if name in ("setup", "teardown") and "pl_module" in _parameters(getattr(owner, name)):
            hook = "post_setup" if name == "setup" else "post_fit"
            raise TypeError(
                f"{owner.__qualname__}.{name} is a hook of Lightning and would never be called; "
                f"write {hook}(self), where self.trainer is the trainer"
            )
        nearest = FOREIGN_HOOKS.get(name) or next((n for n in names if _is_typo(name, n)), None)
        is_reserved = owner is cls and name.startswith(_RESERVED_PREFIXES)
        if nearest or is_reserved:
            nearest = nearest or difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise TypeError(
                f"{owner.__qualname__}.{name} is not a hook and would never be called; "
                f"did you mean {nearest}? If it is a method of your own, name it _{name}: "
                f"{', '.join(_RESERVED_PREFIXES)}… are for hooks"
            )


def _is_typo(name: str, hook: str) -> bool:
    """Whether a name differs from a hook's by one letter, by underscores, case or a synonym.

    One letter too many, too few, another one, or two exchanged; with as many underscores, so that
    `reconfigure` is a name of its own.
    """
    if _plain(name) == _plain(hook):
        return True
    if name.count("_") != hook.count("_") or abs(len(name) - len(hook)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(name, hook, strict=False)) if a != b), None)
    if start is None:  # one is the beginning of the other
        return True
    mine, its = name[start:], hook[start:]
    exchanged = mine[1:2] + mine[:1] + mine[2:]
    return mine[1:] == its[1:] or mine[1:] == its or mine == its[1:] or exchanged == its


def _plain(name: str) -> str:
    words = f"_{name.lower()}".replace("training", "train").replace("_val_", "_validation_")
    return words.replace("_", "")


def _methods_to_check(cls: type, root: type) -> Iterator[tuple[str, type]]:
    """Methods of `cls` and of its bases that aren't callbacks, each with its class."""
    for owner in cls.__mro__:
        if owner is cls or not (root in owner.__mro__ or owner in root.__mro__):
            yield from ((name, owner) for name, value in vars(owner).items() if _is_method(value))


def _refuse_hidden_method(cls: type, root: type, name: str) -> None:
    """In `class C(Callback, Mixin)` the root's empty hook precedes the mixin's."""
    for base in cls.__mro__[cls.__mro__.index(root) + 1 :]:
        if name in vars(base) and not getattr(base, "_is_protocol", False):
            raise TypeError(
                f"{cls.__qualname__}: {base.__qualname__}.{name} would never be called, because "
                f"that of {root.__name__} comes first; list {base.__name__} first among the bases "
                f"of {cls.__name__}"
            )


def _refuse_uncallable_method(cls: type, name: str, ways: tuple[tuple[str, ...], ...]) -> None:
    method = getattr(cls, name)
    expected = f"def {name}({', '.join(('self', *ways[0]))})"
    if not callable(method):
        raise TypeError(
            f"{cls.__qualname__}.{name} is a {type(method).__qualname__}, not a method; "
            f"write {expected}, or give it another name"
        )
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        raise TypeError(
            f"{cls.__qualname__}.{name} is a coroutine, which would never be awaited; "
            f"write {expected}"
        )
    if inspect.isgeneratorfunction(method):
        hint = (
            "decorate it with @contextlib.contextmanager"
            if name.endswith("_context")
            else "leave out the yield"
        )
        raise TypeError(
            f"{cls.__qualname__}.{name} is a generator, whose body would never run; {hint}"
        )
    if not any(_takes(cls, name, arguments) for arguments in ways):
        raise TypeError(
            f"{cls.__qualname__}.{name}{_parameters(method)} can't take the hook's arguments; "
            f"write {expected}"
        )


def _takes(cls: type, name: str, arguments: tuple[str, ...]) -> bool:
    """Whether a method accepts its arguments, in the right order."""
    try:
        signature = inspect.signature(getattr(cls, name))
    except ValueError:  # some built-in functions have no signature
        return True
    found = inspect.getattr_static(cls, name)
    gets_self = hasattr(type(found), "__get__") and not isinstance(
        found, (staticmethod, classmethod)
    )
    try:
        bound = signature.bind(*(("self", *arguments) if gets_self else arguments))
    except TypeError:
        return False
    # A parameter with the name of another argument is misplaced.
    return not any(
        parameter in arguments and argument in arguments and parameter != argument
        for parameter, argument in bound.arguments.items()
        if isinstance(argument, str)
    )


def _parameters(method: Any) -> str:
    """The parameters as in the source, without annotations."""
    signature = inspect.signature(method)
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _refuse_invalid_constraints(cls: type, name: str) -> None:
    constraints: Any = getattr(cls, name)
    if isinstance(constraints, (str, type)) or not isinstance(constraints, Collection):
        raise TypeError(
            f"{cls.__qualname__}.{name} is {constraints!r}; a set of classes and names is "
            f"required: {name} = {{…}}"
        )
    for constraint in constraints:
        if not isinstance(constraint, (str, type)):
            raise TypeError(
                f"{cls.__qualname__}.{name} holds {constraint!r}; classes and names are required"
            )


def _is_method(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, (staticmethod, classmethod))
