"""Pickles of functions and classes in test modules, and of local functions.

pytest gives test modules names that can't be imported. So a function or class is pickled with the
path of its file, and a local function, such as a lambda, by its code.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import marshal
import pickle
import sys
import types
from typing import Any

_Reference = tuple[str, str | None]
"""Name and file of a module."""


def dumps(value: Any) -> bytes:
    """Pickle a value, including functions and classes of test modules.

    Raises:
        ValueError: If a class in it is defined inside a function.
    """
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def loads(data: bytes) -> Any:
    """Unpickle the result of `dumps`, in another process on the same machine."""
    return pickle.loads(data)  # noqa: S301  # from the process that started this one


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        is_function = isinstance(value, types.FunctionType)
        if not (is_function or isinstance(value, type)) or value.__module__ == __name__:
            return NotImplemented
        reference = _reference(value.__module__)
        if reference[1] is None:  # built in
            return NotImplemented
        if "<" not in value.__qualname__:
            return _find, (reference, value.__qualname__)
        if not is_function:
            raise ValueError(
                f"{value.__qualname__} is defined inside a function, where other processes can't "
                "find it; move it to the top of the module"
            )
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        defaults = (value.__defaults__, value.__kwdefaults__)
        return _function, (reference, marshal.dumps(value.__code__), cells, *defaults)


def _reference(module: str) -> _Reference:
    # A started process imports the main module under this name.
    name = "__mp_main__" if module == "__main__" else module
    return name, getattr(sys.modules.get(module), "__file__", None)


def _module(reference: _Reference) -> types.ModuleType:
    name, file = reference
    if name in sys.modules:
        return sys.modules[name]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        if file is None:
            raise
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, f"{file} can't be imported"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _find(reference: _Reference, qualname: str) -> Any:
    found: Any = _module(reference)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def _function(
    reference: _Reference,
    code: bytes,
    cells: tuple[Any, ...],
    defaults: tuple[Any, ...] | None,
    keyword_defaults: dict[str, Any] | None,
) -> types.FunctionType:
    closure = tuple(types.CellType(value) for value in cells)
    namespace = vars(_module(reference))
    function = types.FunctionType(
        marshal.loads(code),
        namespace,
        argdefs=defaults,
        closure=closure,
    )
    function.__kwdefaults__ = keyword_defaults
    return function
