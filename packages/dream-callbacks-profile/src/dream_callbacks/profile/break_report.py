"""What torch.compile did, in words: pure text, made of compilations and the modules' names."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from dream_callbacks.profile.compilations import Compilation

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""What torch calls the module inside of one that it wrapped round it."""


def module_names(models: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """Names of all modules of all models, as a person would write them."""
    return {
        module: ".".join(part for part in path.split(".") if part not in _WRAPPERS)
        for name, model in models.items()
        for path, module in model.named_modules(prefix=name)
    }


def is_cut(compilation: Compilation) -> bool:
    """Whether some of the function doesn't run compiled."""
    return bool(compilation.graph_breaks) or compilation.failure is not None


def summary(compilations: Collection[Compilation], names: Mapping[nn.Module, str]) -> str:
    """One line: how many of what, and where."""
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
    where = dict.fromkeys(_owner(c, names) for c in compilations if is_cut(c))
    return f"{text}: {_listed(where)}" if where else text


def entry(
    compilation: Compilation, all_seen: Iterable[Compilation], names: Mapping[nn.Module, str]
) -> str:
    """A paragraph on one compilation.

    Args:
        compilation: With a graph break, a failure or a reason to compile again.
        all_seen: All compilations of the run, to find who runs the same code.
        names: By module.
    """
    where = f"{compilation.function or 'the function'} ({compilation.file}:{compilation.line})"
    lines = [f"{_owner(compilation, names)}   [compile id {compilation.compile_id}]"]
    if compilation.failure is not None:
        lines += [f"  left uncompiled: {where}, because", _indented(compilation.failure)]
    for graph_break in compilation.graph_breaks:
        lines += [f"  graph break in {where}:", _indented(graph_break.reason), "    at"]
        lines += [
            f"      {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
            for frame in graph_break.stack
        ]
    if compilation.recompile_reason is not None:
        lines += [f"  compiled again: {where}, because", _indented(compilation.recompile_reason)]
    sharing = _others_that_share(compilation, all_seen, names)
    if sharing and is_cut(compilation):
        lines.append(f"  the same code serves {_listed(sharing)}, where its guards hold")
    return "\n".join(lines)


def _others_that_share(
    compilation: Compilation, all_seen: Iterable[Compilation], names: Mapping[nn.Module, str]
) -> list[str]:
    """Instances of the class for which the function wasn't compiled separately."""
    compiled_for = {id(c.module) for c in all_seen if c.code == compilation.code}
    return [
        name
        for module, name in names.items()
        if type(module) is type(compilation.module) and id(module) not in compiled_for
    ]


def _owner(compilation: Compilation, names: Mapping[nn.Module, str]) -> str:
    if compilation.module is None:
        return "outside of any module"
    class_name = type(compilation.module).__name__
    return f"{names.get(compilation.module, 'a module of no model')} ({class_name})"


def _listed(items: Iterable[str], limit: int = 4) -> str:
    items = list(items)
    more = [f"{len(items) - limit} more"] if len(items) > limit else []
    return ", ".join(items[:limit] + more)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _indented(text: str) -> str:
    # Blank lines separate entries.
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return textwrap.indent("\n".join(lines), "    ")
