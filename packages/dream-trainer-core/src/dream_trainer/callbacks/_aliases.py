"""Lazy imports of the built-in callbacks, which other distributions contain.

The table is frozen; a new callback is imported from its own package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

_NAMES_BY_PACKAGE: dict[str, dict[str, tuple[str, ...]]] = {
    "dream_trainer.callbacks": {
        "checkpoint": (
            "CheckpointCallback",
            "AsyncCheckpointCallback",
            "LoadPartialCheckpointCallback",
            "ExportCallback",
            "CheckpointParameters",
        ),
        "logging": (
            "LoggerCallback",
            "LRLoggerCallback",
            "MetricLoggerCallback",
            "MediaLoggerCallback",
            "ModelWatchCallback",
            "JSONLinesSink",
            "TensorBoardSink",
            "WandBSink",
        ),
        "summary": ("ProgressBar", "TrainerSummary", "ModelSummary"),
        "profile": ("ProfileCallback", "FindGraphBreaksCallback", "BenchmarkCallback"),
        "fsdp": ("OptimizeFSDP",),
    },
    "dream_trainer.trainer.mixins": {"logging": ("WandBLoggerMixin",)},
    "dream_trainer.configs": {"checkpoint": ("CheckpointParameters",)},
}


def names_in(module: str) -> list[str]:
    """Names that `module` forwards to installed distributions.

    Others are left out: code that gets each name in `dir()`, as `help()` does, would raise.
    """
    return [
        name
        for package, names in _NAMES_BY_PACKAGE[module].items()
        if _is_installed(f"dream_callbacks.{package}")
        for name in names
    ]


def resolve(module: str, name: str) -> Any:
    """The object that `module` forwards `name` to.

    Raises:
        AttributeError: If `module` has no such name.
        ImportError: If the distribution that holds it isn't installed or is too old for the
            name. An error inside an installed distribution is raised as it is.
    """
    for package, names in _NAMES_BY_PACKAGE[module].items():
        if name in names:
            return _import_from(package, name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def _import_from(package: str, name: str) -> Any:
    distribution = f"dream-callbacks-{package}"
    target = f"dream_callbacks.{package}"
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name not in ("dream_callbacks", target):
            raise
        raise ImportError(
            f"{name} is in {distribution}, which is not installed: pip install {distribution}",
            name=target,
        ) from None
    try:
        return getattr(module, name)
    except AttributeError:
        raise ImportError(
            f"{name} is not in the installed {distribution}{_version(distribution)}: "
            f"pip install --upgrade {distribution}",
            name=target,
        ) from None


def _is_installed(target: str) -> bool:
    try:
        return importlib.util.find_spec(target) is not None
    except ImportError:  # the namespace itself doesn't exist
        return False


def _version(distribution: str) -> str:
    """Its version after a space; empty if it has no metadata, as in a clone."""
    try:
        return f" {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return ""
