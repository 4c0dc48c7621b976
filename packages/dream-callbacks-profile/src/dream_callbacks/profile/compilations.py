"""torch.compile's compilations during a run, with their graph breaks and modules.

Nothing is reset, run twice or patched: dynamo calls back for each compilation and keeps a list of
graph breaks. It doesn't report the module *instance*, but it compiles while that module is being
called, so the module is found on the Python stack.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from traceback import FrameSummary
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch._dynamo.callback import CallbackArgs


@dataclass(frozen=True)
class GraphBreak:
    """A place where compiled code returns to Python.

    Attributes:
        reason: Dynamo's explanation with hints, on several lines.
        stack: User stack of the break, outermost call first.
    """

    reason: str
    stack: tuple[FrameSummary, ...]


@dataclass(frozen=True)
class Compilation:
    """One attempt to compile one function.

    Attributes:
        compile_id: "3/1": function 3, first recompilation.
        module: Module whose call was compiled; None outside any module.
        function: Name of the function; "" if dynamo failed before reading it.
        file: Source file of the function.
        line: First line of the function.
        graph_breaks: Graph breaks in the function.
        failure: Why it runs uncompiled; None if it is compiled.
        recompile_reason: The guard that failed; None for a first compilation.
        duration_s: Compile time in seconds.
    """

    compile_id: str
    module: nn.Module | None
    function: str
    file: str
    line: int
    graph_breaks: tuple[GraphBreak, ...]
    failure: str | None
    recompile_reason: str | None
    duration_s: float

    @property
    def code(self) -> tuple[str, int]:
        """Key of the function; modules of one class share it and its compiled code."""
        return self.file, self.line


class CompileWatch:
    """Collects compilations of this process from `start` to `stop`."""

    def __init__(self) -> None:
        self._compilations: list[Compilation] = []
        self._last_metrics: object = None
        self._num_breaks_at_start = 0
        # Breaks by compile id, modules by its number before the slash.
        self._breaks: dict[str, tuple[GraphBreak, ...]] = {}
        self._modules: dict[str, nn.Module | None] = {}

    def start(self) -> None:
        """Start watching. Imports dynamo, which takes most of a second."""
        from torch._dynamo import callback_handler

        self._last_metrics = _last(_all_metrics())
        callback_handler.register_start_callback(self._on_start)
        callback_handler.register_end_callback(self._on_end)

    def stop(self) -> None:
        """Stop watching; collected compilations can still be taken."""
        from torch._dynamo import callback_handler

        # torch._dynamo.reset() may have removed them.
        if self._on_start in callback_handler.start_callbacks:
            callback_handler.remove_start_callback(self._on_start)
        if self._on_end in callback_handler.end_callbacks:
            callback_handler.remove_end_callback(self._on_end)

    def take(self) -> list[Compilation]:
        """Compilations since the last call; costs 1 µs if there are none."""
        self._collect()
        taken, self._compilations = self._compilations, []
        return taken

    def _on_start(self, args: CallbackArgs) -> None:
        from torch._dynamo import graph_break_reasons

        self._collect()  # dynamo keeps only the last 64
        if args.callback_trigger.name == "DYNAMO":
            self._num_breaks_at_start = len(graph_break_reasons)
            self._modules[_function_number(args.compile_id)] = _called_module()

    def _on_end(self, args: CallbackArgs) -> None:
        from torch._dynamo import graph_break_reasons

        if args.callback_trigger.name == "DYNAMO":
            new = graph_break_reasons[self._num_breaks_at_start :]
            self._breaks[args.compile_id] = tuple(
                GraphBreak(found.reason, tuple(found.user_stack)) for found in new
            )

    def _collect(self) -> None:
        all_metrics = _all_metrics()
        last = _last(all_metrics)
        if last is self._last_metrics:
            return
        known = [i for i, metrics in enumerate(all_metrics) if metrics is self._last_metrics]
        self._last_metrics = last
        for metrics in all_metrics[known[0] + 1 if known else 0 :]:
            if metrics.is_forward is not False:
                self._compilations.append(self._compilation(metrics))

    def _compilation(self, metrics: Any) -> Compilation:
        compile_id = str(metrics.compile_id)
        failure = None
        if metrics.fail_type is not None:
            failure = metrics.fail_reason or metrics.fail_type
        return Compilation(
            compile_id=compile_id,
            module=self._modules.get(_function_number(compile_id)),
            function=metrics.co_name or "",
            file=metrics.co_filename or "",
            line=metrics.co_firstlineno or 0,
            graph_breaks=self._breaks.pop(compile_id, ()),
            failure=failure,
            recompile_reason=metrics.recompile_reason,
            duration_s=(metrics.duration_us or 0) / 1e6,
        )


def _all_metrics() -> list[Any]:
    from torch._dynamo.utils import get_compilation_metrics

    return get_compilation_metrics()


def _last(all_metrics: list[Any]) -> object:
    return all_metrics[-1] if all_metrics else None


def _function_number(compile_id: str) -> str:
    return compile_id.partition("/")[0]


def _called_module() -> nn.Module | None:
    """The innermost module being called, from within a dynamo callback."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module):
            return caller
        frame = frame.f_back
    return None
