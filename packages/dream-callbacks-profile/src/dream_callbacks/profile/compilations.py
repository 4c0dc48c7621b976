"""What torch.compile does while a run goes on: each compilation, its graph breaks, and whose it is.

Nothing is reset, run twice or patched: dynamo tells of each compilation and keeps a list of graph
breaks by itself. It doesn't say which module *instance* it compiles, but it compiles while that
module is being called, so the module is found in the Python stack of that moment.
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
        reason: Dynamo's explanation, with hints; several lines.
        stack: Where, outermost call first.
    """

    reason: str
    stack: tuple[FrameSummary, ...]


@dataclass(frozen=True)
class Compilation:
    """One attempt to compile one function.

    Attributes:
        compile_id: "3/1": function 3, compiled again once.
        module: Whose method it is; None if it was compiled outside of any module's call.
        function: Name of the function; "" if dynamo gave up before it looked.
        file: Where the function is.
        line: First line of the function.
        graph_breaks: Places where its graph was cut.
        failure: Why it runs uncompiled; None if it doesn't.
        recompile_reason: What had changed since it was compiled before.
        duration_s: Seconds that it took.
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
        """Identifies the function: modules of one class share it, and what was compiled of it."""
        return self.file, self.line


class CompileWatch:
    """Collects compilations of this process from `start` to `stop`."""

    def __init__(self) -> None:
        self._compilations: list[Compilation] = []
        self._last_metrics: object = None
        self._num_breaks_at_start = 0
        # By compile id, and by its number before the slash.
        self._breaks: dict[str, tuple[GraphBreak, ...]] = {}
        self._modules: dict[str, nn.Module | None] = {}

    def start(self) -> None:
        """Watch from now on. Imports dynamo, which takes most of a second."""
        from torch._dynamo import callback_handler

        self._last_metrics = _last(_all_metrics())
        callback_handler.register_start_callback(self._on_start)
        callback_handler.register_end_callback(self._on_end)

    def stop(self) -> None:
        """Watch no more; what was collected can still be taken."""
        from torch._dynamo import callback_handler

        # torch._dynamo.reset() may have removed them.
        if self._on_start in callback_handler.start_callbacks:
            callback_handler.remove_start_callback(self._on_start)
        if self._on_end in callback_handler.end_callbacks:
            callback_handler.remove_end_callback(self._on_end)

    def take(self) -> list[Compilation]:
        """Compilations since the last time; 1 µs if there are none."""
        self._collect()
        taken, self._compilations = self._compilations, []
        return taken

    def _on_start(self, args: CallbackArgs) -> None:
        from torch._dynamo import graph_break_reasons

        self._collect()  # dynamo keeps the last 64 only
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
    """The module that is being called, seen from inside of a callback of dynamo's."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module):
            return caller
        frame = frame.f_back
    return None
