"""`python -m dream_callbacks.checkpoint`: list, verify, show, prune, export, prove."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_callbacks.checkpoint.catalog import (
    Catalog,
    Checkpoint,
    damage_of,
    directory_at,
    filesystem_at,
    read_catalog,
)
from dream_callbacks.checkpoint.command_output import json_text, table
from dream_callbacks.checkpoint.errors import (
    CheckpointError,
    DamagedCheckpointError,
    format_bytes,
)
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.state_codec import decode_plain
from dream_callbacks.checkpoint.io import atomic_commit
from dream_callbacks.checkpoint.io.filesystem import Filesystem
from dream_callbacks.checkpoint.retention import (
    KeepRules,
    candidates,
    recorded_choice,
    to_delete,
)

if TYPE_CHECKING:
    from dream_callbacks.checkpoint.retention import ResumeMode
    from dream_callbacks.checkpoint.weights import Format

# torch takes a second to import: only the commands that need it import it.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit status: 0 on success, 1 if a checkpoint is damaged or the command fails.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CheckpointError, DamagedCheckpointError, OSError, ImportError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dream_callbacks.checkpoint",
        description="Look at the checkpoints of a run, verify, prune and export them: no model is "
        "built, nothing is unpickled. Prove that a trainer resumes bit for bit.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.set_defaults(run=run)
        found.add_argument(
            "directory",
            metavar="DIR",
            help="a run directory, the folder checkpoints in it, or one checkpoint",
        )
        return found

    ls = command("ls", _ls, "List the checkpoints.")
    ls.add_argument("--monitor", default=None, help="the metric to show; default: all")
    verify = command("verify", _verify, "Compare every file with its checksum.")
    show = command("show", _show, "Show what is in a checkpoint: by default the newest.")
    prune = command("prune", _prune, "Delete the checkpoints that no retention rule keeps.")
    prune.add_argument("--keep-last", type=_count, required=True, metavar="N")
    prune.add_argument("--keep-top-k", type=_count, default=0, metavar="K")
    prune.add_argument("--keep-every", type=_count, default=None, metavar="STEPS")
    prune.add_argument("--monitor", default="val_loss")
    prune.add_argument("--mode", choices=("min", "max"), default="min")
    prune.add_argument("--dry-run", action="store_true", help="list without deleting")
    export = command("export", _export, "Write the weights of a checkpoint to files.")
    export.add_argument("output", metavar="OUT", help="a file, or a folder for a file per model")
    export.add_argument("--format", choices=("safetensors", "torch"), default=None)
    which = export.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="the checkpoint with the best metric")
    which.add_argument("--last", action="store_true", help="the newest one: the default")
    which.add_argument("--step", type=_count, default=None, help="that of a step")
    export.add_argument("--monitor", default=None, help="metric of --best; default: the run's")
    export.add_argument("--mode", choices=("min", "max"), default=None, help="of --monitor")
    for each in (verify, show):
        each.add_argument("--step", type=int, default=None, help="step; default: see above")
    text = "Train a trainer straight through, and killed and resumed; name the first difference."
    proof = commands.add_parser("prove", help=text, description=text)
    proof.set_defaults(run=_prove)
    proof.add_argument(
        "trainer",
        metavar="TRAINER",
        help="module:function or file.py:function; the function returns a trainer, not set up",
    )
    proof.add_argument("--steps", type=_count, default=5, help="before and after the kill")
    proof.add_argument("--ranks", type=_count, default=1, help="processes per run")
    proof.add_argument("--in-validation", action="store_true", help="kill in a validation")
    proof.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN", help="values to skip"
    )
    proof.add_argument("--folder", type=Path, default=None, help="of the runs; default: temporary")
    proof.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="per run")
    for each in (ls, verify, show, prune, proof):
        each.add_argument("--json", action="store_true", help="print JSON")
    return parser


# Commands


def _ls(options: argparse.Namespace) -> int:
    filesystem, catalog, step = _opened(options)
    checkpoints = [c for c in catalog.checkpoints if step in (None, c.step)]
    if options.json:
        documents = [_document(filesystem, c) for c in checkpoints]
        print(json_text({"checkpoints": documents, "damaged": catalog.damaged}))
        return 0
    names = sorted({n for c in checkpoints for n in c.metrics})
    shown = names if options.monitor is None else [options.monitor]
    rows = [
        [
            str(c.step),
            str(c.manifest.epoch),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(c.manifest.created_unix)),
            format_bytes(c.manifest.num_bytes),
            str(c.manifest.world_size),
            *(f"{c.metrics[n]:.5g}" if n in c.metrics else "" for n in shown),
            c.manifest.reason,
            "NaN in weights" if c.manifest.has_nan else "",
        ]
        for c in checkpoints
    ]
    head = ["step", "epoch", "saved", "size", "ranks", *shown, "why", ""]
    print(filesystem)
    print(table(head, rows) if rows else "no checkpoints")
    for name, what in catalog.damaged.items():
        print(f"{name} is damaged: {what}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from dream_callbacks.checkpoint.restore import SavedState

    filesystem, catalog, step = _opened(options)
    checkpoints = [c for c in catalog.checkpoints if step in (None, c.step)]
    found = {
        name: [what]
        for name, what in catalog.damaged.items()
        if step in (None, file_names.step_of(name))
    }
    if not checkpoints and not found:
        raise CheckpointError(f"there are no checkpoints in {filesystem}; list them with ls")
    for checkpoint in checkpoints:
        damage = damage_of(filesystem, checkpoint, checksums=True)
        if not damage:
            try:
                SavedState(filesystem, checkpoint)
            except DamagedCheckpointError as error:
                damage = [str(error)]
        found[checkpoint.name] = damage
        if not options.json:
            size = format_bytes(checkpoint.manifest.num_bytes)
            print(f"{checkpoint.name}  {'damaged' if damage else 'intact'}  {size}", flush=True)
            for problem in damage:
                print(f"  {problem}")
    if options.json:
        print(json_text({"damage": found}))
    else:
        for name, what in catalog.damaged.items():
            if name in found:
                print(f"{name}  damaged\n  {what}")
    return 1 if any(found.values()) else 0


def _show(options: argparse.Namespace) -> int:
    from dream_callbacks.checkpoint.restore import SavedState

    filesystem, catalog, step = _opened(options)
    checkpoint = _one(filesystem, catalog, step)
    saved = SavedState(filesystem, checkpoint)
    counters = decode_plain(saved.shared["trainer"]["counters"])
    callbacks = sorted(saved.shared["trainer"]["callbacks"])
    if options.json:
        tensors = {n: [str(t.dtype), list(t.shape)] for n, t in saved.index.items()}
        extra = {"counters": counters, "callbacks": callbacks, "tensors": tensors}
        print(json_text({**_document(filesystem, checkpoint), **extra}))
        return 0
    manifest = checkpoint.manifest
    axes = ", ".join(f"{axis} {size}" for axis, size in manifest.shape.items() if size > 1)
    saved_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created_unix))
    facts = {
        "checkpoint": f"{filesystem}/{checkpoint.name}",
        "saved": f"{saved_at}, {manifest.reason}",
        "size": f"{format_bytes(manifest.num_bytes)} in {len(manifest.files)} files",
        "ranks": f"{manifest.world_size}{f' ({axes})' if axes else ''}",
        "torch": manifest.torch_version,
        "weights": "with NaN" if manifest.has_nan else "finite or infinite, no NaN",
        **{f"result {name}": f"{value:.6g}" for name, value in checkpoint.metrics.items()},
        **{name: str(value) for name, value in counters.items()},
        "callbacks": ", ".join(callbacks) or "none with a state",
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    rows = [
        [name, str(t.dtype).removeprefix("torch."), "×".join(map(str, t.shape)) or "scalar"]
        for name, t in saved.index.items()
        if name.startswith("models.")
    ]
    print()
    print(table(["tensor", "dtype", "shape"], rows))
    others = len(saved.index) - len(rows)
    print(f"and {others} tensors of optimizers, callbacks and random states")
    return 0


def _prune(options: argparse.Namespace) -> int:
    rules = KeepRules(
        last=options.keep_last,
        top_k=options.keep_top_k,
        every=options.keep_every,
        monitor=options.monitor,
        mode=options.mode,
    )
    filesystem, _, step = _opened(options)
    if step is not None:
        raise CheckpointError(f"prune takes a directory of checkpoints: give {filesystem}")
    if not filesystem.renames_at_once and not options.dry_run:
        raise CheckpointError(
            f"it is unknown whether a run still saves to {filesystem}, so nothing is deleted; "
            "--dry-run lists what would be"
        )
    lock = filesystem.lock(uuid.uuid4().hex)
    if not options.dry_run:
        lock.acquire()
    try:
        catalog = read_catalog(filesystem)
        intact = [c for c in catalog.checkpoints if not damage_of(filesystem, c, checksums=False)]
        doomed = [c for c in to_delete(intact, rules) if not filesystem.is_being_read(c.name)]
        if not options.dry_run:
            atomic_commit.recover(filesystem)
            for checkpoint in doomed:
                atomic_commit.discard(filesystem, checkpoint.name)
    finally:
        lock.release()
    num_bytes = sum(c.manifest.num_bytes for c in doomed)
    if options.json:
        print(json_text({"deleted": [c.name for c in doomed], "bytes": num_bytes}))
        return 0
    verb = "would delete" if options.dry_run else "deleted"
    for checkpoint in doomed:
        print(f"{verb} {checkpoint.name}  {format_bytes(checkpoint.manifest.num_bytes)}")
    print(f"{verb} {len(doomed)} of {len(intact)}, {format_bytes(num_bytes)}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from dream_callbacks.checkpoint.weights import export_checkpoint

    root, step = directory_at(options.directory)
    which: ResumeMode = "best" if options.best else "last"
    which = which if options.step is None else options.step
    if step is not None:
        if options.best or options.last or options.step not in (None, step):
            raise CheckpointError(
                f"{options.directory} is the checkpoint of step {step}; give the run directory to "
                "choose another one"
            )
        which = step
    filesystem = filesystem_at(root)
    catalog = read_catalog(filesystem)
    choice = recorded_choice(catalog, which, options.monitor, options.mode, "--")
    found = candidates(catalog, choice)
    for text in found.warnings:
        sys.stderr.write(f"{text}\n")
    if not found.checkpoints:
        raise CheckpointError(f"there is no checkpoint in {filesystem} yet")
    checkpoint = found.checkpoints[0]
    kind: Format = "torch" if Path(options.output).suffix == ".pt" else "safetensors"
    kind = options.format or kind
    with filesystem.reading(checkpoint.name):
        _check_intact(filesystem, catalog, checkpoint)
        paths = export_checkpoint(filesystem, checkpoint, options.output, kind)
    for path in paths:
        print(f"{path}  {format_bytes(path.stat().st_size)}  from {checkpoint.name}")
    return 0


def _prove(options: argparse.Namespace) -> int:
    from dream_callbacks.checkpoint.testing.resume_equivalence import prove

    with contextlib.ExitStack() as stack:
        folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory())
        proof = prove(
            options.trainer,
            folder,
            steps=options.steps,
            kill_in="validation" if options.in_validation else "step",
            num_ranks=options.ranks,
            ignore=options.ignore,
            timeout_s=options.timeout,
        )
    print(json_text(dataclasses.asdict(proof)) if options.json else proof)
    return 0 if proof.difference is None else 1


# Helpers


def _opened(options: argparse.Namespace) -> tuple[Filesystem, Catalog, int | None]:
    root, step = directory_at(options.directory)
    step = getattr(options, "step", None) if step is None else step
    filesystem = filesystem_at(root)
    return filesystem, read_catalog(filesystem), step


def _one(filesystem: Filesystem, catalog: Catalog, step: int | None) -> Checkpoint:
    """The checkpoint of a step, or the newest, with verified files."""
    found = catalog.of_step(step) if step is not None else None
    if step is None and catalog.checkpoints:
        found = catalog.checkpoints[-1]
    if found is None:
        what = "checkpoint" if step is None else f"intact checkpoint of step {step}"
        raise CheckpointError(
            f"there is no {what} in {filesystem}; the newest steps are: {_newest_steps(catalog)}"
        )
    _check_intact(filesystem, catalog, found)
    return found


def _check_intact(filesystem: Filesystem, catalog: Catalog, checkpoint: Checkpoint) -> None:
    damage = damage_of(filesystem, checkpoint, checksums=True)
    if damage:
        raise CheckpointError(
            f"{damage[0]}; give the --step of another checkpoint: {_newest_steps(catalog)}"
        )


def _newest_steps(catalog: Catalog) -> str:
    return ", ".join(str(c.step) for c in catalog.checkpoints[-10:]) or "none"


def _document(filesystem: Filesystem, checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return {
        "path": f"{filesystem}/{checkpoint.name}",
        "step": manifest.step,
        "epoch": manifest.epoch,
        "seq": manifest.seq,
        "reason": manifest.reason,
        "created_unix": manifest.created_unix,
        "bytes": manifest.num_bytes,
        "world_size": manifest.world_size,
        "shape": dict(manifest.shape),
        "metrics": checkpoint.metrics,
        "has_nan": manifest.has_nan,
        "torch": manifest.torch_version,
    }


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("a whole number of at least 0 is required")
    return value


if __name__ == "__main__":
    sys.exit(main())
