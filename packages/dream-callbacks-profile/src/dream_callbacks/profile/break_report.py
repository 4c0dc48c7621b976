"""Text of the graph break report, from compilations and module names."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from dream_callbacks.profile.compilations import Compilation

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""Attribute names of the wrapped module in torch's wrappers."""


def module_names(models: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """Names of all modules of all models, without wrappers."""
    return {
        module: ".".join(part for part in path.split(".") if part not in _WRAPPERS)
        for name, model in models.items()
        for path, module in model.named_modules(prefix=name)
    }


def has_break(compilation: Compilation) -> bool:
    """Whether the function has a graph break or is left uncompiled."""
    return bool(compilation.graph_breaks) or compilation.failure is not None


def format_summary(compilations: Collection[Compilation], names: Mapping[nn.Module, str]) -> str:
    """One line with counts and module names."""
    num_breaks = sum(len(c.graph_breaks) for c in compilations)
    num_uncompiled = sum(c.failure is not None for c in compilations)
    num_recompiled = sum(c.recompile_reason is not None for c in compilations)
    total_s = sum(c.duration_s for c in compilations)
    text = (
        f"{_count(num_breaks, 'graph break')}, "
        f"{_count(num_uncompiled, 'function')} left uncompiled, "
        f"{_count(num_recompiled, 'recompilation')} in "
        f"{_count(len(compilations), 'compilation')} ({total_s:.1f} s)"
    )
    where = dict.fromkeys(_owner(c, names) for c in compilations if has_break(c))
    return f"{text}: {_join(where)}" if where else text


def format_entry(
    compilation: Compilation,
    all_compilations: Iterable[Compilation],
    names: Mapping[nn.Module, str],
) -> str:
    """A paragraph about one compilation.

    Args:
        compilation: A compilation with a graph break, a failure or a recompile reason.
        all_compilations: All compilations of the run, to find instances that share the code.
        names: Module names by module.
    """
    where = f"{compilation.function or 'the function'} ({compilation.file}:{compilation.line})"
    lines = [f"{_owner(compilation, names)}   [compile id {compilation.compile_id}]"]
    if compilation.failure is not None:
        lines += [f"  left uncompiled: {where}, because", _indent(compilation.failure)]
    for graph_break in compilation.graph_breaks:
        lines += [f"  graph break in {where}:", _indent(graph_break.reason), "    at"]
        lines += [
            f"      {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
            for frame in graph_break.stack
        ]
    if compilation.recompile_reason is not None:
        lines += [f"  recompiled: {where}, because", _indent(compilation.recompile_reason)]
    sharing = _others_that_share(compilation, all_compilations, names)
    if sharing and has_break(compilation):
        lines.append(f"  also used by {_join(sharing)}, if its guards hold")
    return "\n".join(lines)


def _others_that_share(
    compilation: Compilation,
    all_compilations: Iterable[Compilation],
    names: Mapping[nn.Module, str],
) -> list[str]:
    """Instances of the same class for which the function wasn't compiled separately."""
    compiled_for = {id(c.module) for c in all_compilations if c.code == compilation.code}
    return [
        name
        for module, name in names.items()
        if type(module) is type(compilation.module) and id(module) not in compiled_for
    ]


def _owner(compilation: Compilation, names: Mapping[nn.Module, str]) -> str:
    if compilation.module is None:
        return "outside any module"
    class_name = type(compilation.module).__name__
    return f"{names.get(compilation.module, 'a module of no model')} ({class_name})"


def _join(items: Iterable[str], limit: int = 4) -> str:
    items = list(items)
    more = [f"{len(items) - limit} more"] if len(items) > limit else []
    return ", ".join(items[:limit] + more)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _indent(text: str) -> str:
    # Blank lines separate entries.
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return textwrap.indent("\n".join(lines), "    ")
