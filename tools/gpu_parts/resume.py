"""Part 4: resuming on a GPU is bit-exact, also on another device; both kinds of save are equal."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch

from dream_callbacks.checkpoint import (
    AsyncCheckpointCallback,
    CheckpointCallback,
    CheckpointParameters,
)
from dream_callbacks.checkpoint.testing import prove
from dream_trainer.callbacks import Callback, Every
from dream_trainer.configs import DeviceParameters
from tools.gpu_parts.cases import Case, rank_variables, run_cases
from tools.gpu_parts.device_work import keep_busy
from tools.gpu_parts.part import Part
from tools.gpu_parts.trainers import NetTrainer, OneRankWorld, net_config

NUM_BATCHES = 6
STOPS = {"in the middle of an epoch": 4, "at the end of an epoch": NUM_BATCHES}
TIMEOUT_S = 75.0


def run(part: Part) -> None:
    """Prove the stops, each in its own process; compare files and devices in others."""
    arguments = {"device": part.device, "folder": str(part.folder)}
    stops = dict(STOPS)
    if part.is_small:
        part.not_run("stopped at the end of an epoch", "small sizes")
        del stops["at the end of an epoch"]
    cases = {
        name: Case("resume:proved", {**arguments, "steps": steps}) for name, steps in stops.items()
    }
    cases["files"] = Case("resume:files_of_both", arguments, rank_variables())
    if part.on_gpu:
        cases["moves"] = Case("resume:moved", {"folder": str(part.folder)})
    else:
        part.not_run("a checkpoint of the GPU on the CPU, and the reverse", "no GPU")
    outcomes = run_cases(cases, part.folder, TIMEOUT_S)
    for name in stops:
        with part.attempt(f"stopped {name}"):
            found = outcomes[name].value()
            part.expect(
                f"stopped {name}, with dropout, workers, pinned memory, fused AdamW",
                found["is_exact"],
                {"result": found["text"], "seconds": outcomes[name].seconds},
                "every batch, result and state is the same bit for bit",
            )
    with part.attempt("files of sync and async saves"):
        sync, asynchronous = outcomes["files"].value()
        part.expect(
            "files of tensors of sync and async saves, with training on a stream of its own",
            sync == asynchronous and bool(sync),
            {"files": len(sync), "equal": sync == asynchronous},
            "the same bytes",
        )
    if part.on_gpu:
        with part.attempt("a checkpoint of the GPU on the CPU, and the reverse"):
            for name, is_equal in outcomes["moves"].value().items():
                part.expect(name, is_equal, is_equal, "the same weights; a further step works")


# Exactness


def make_trainer(device: Literal["cpu", "cuda"]) -> NetTrainer:
    """A trainer with all that resuming must restore."""
    fused = {"fused": True} if device == "cuda" else {}
    config = net_config(
        "runs",
        DeviceParameters.SINGLE_DEVICE(device=device, deterministic=True),
        [],
        num_batches=NUM_BATCHES,
        dropout=0.2,
        num_workers=2,
        shuffle=True,
        optimizer_options=fused,
    )
    return NetTrainer(config)


def on_cpu() -> NetTrainer:
    """As `prove` needs it."""
    return make_trainer("cpu")


def on_cuda() -> NetTrainer:
    """As `prove` needs it."""
    return make_trainer("cuda")


def proved(device: str, folder: str, steps: int) -> dict[str, Any]:
    """Train, kill and resume, and compare."""
    make = f"tools.gpu_parts.resume:on_{device}"
    proof = prove(make, Path(folder) / f"proof-{steps}", steps=steps, timeout_s=TIMEOUT_S)
    return {"is_exact": proof.difference is None, "text": str(proof)}


# Files


class QueuesWork(NetTrainer):
    """Changes a weight after 0.2 s of work on the device, so a save that doesn't wait is wrong."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        if self.world.device.type == "cuda":
            keep_busy(200)
        with torch.no_grad():
            self.model.head.weight.add_(1.0)
        return result


def files_of_both(device: Literal["cpu", "cuda"], folder: str) -> list[dict[str, str]]:
    """Digests of the files of tensors that each kind of save writes."""
    saving = CheckpointParameters(every=Every(steps=2), keep_last=5)
    kinds: list[Callback[Any]] = [CheckpointCallback(saving), AsyncCheckpointCallback(saving)]
    found = []
    for callback in kinds:
        root = Path(folder) / type(callback).__name__
        parameters = DeviceParameters.SINGLE_DEVICE(device=device, deterministic=True)
        config = net_config(root, parameters, [callback], training={"max_steps": 4}, width=256)
        # With several ranks both save in a thread, whose stream isn't that of the training.
        world = OneRankWorld(parameters, shards=False)
        with torch.cuda.stream(torch.cuda.Stream() if device == "cuda" else None):
            QueuesWork(config, world=world).fit()
        world.shutdown()
        files = sorted(root.rglob("*.distcp"))
        found.append(
            {
                str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
                for file in files
            }
        )
    return found


# Devices


def moved(folder: str) -> dict[str, bool]:
    """Save on one device, resume on the other: whether the weights are the same."""
    devices: tuple[Literal["cpu", "cuda"], ...] = ("cuda", "cpu")
    found = {}
    for source in devices:
        target = devices[devices[0] == source]
        root = Path(folder) / f"from-{source}"
        saved = trained_to(root, source, 3)
        before = {name: w.detach().cpu() for name, w in saved.model.state_dict().items()}
        resumed = trained_to(root, target, 3)
        after = {name: w.detach().cpu() for name, w in resumed.model.state_dict().items()}
        is_equal = all(before[name].equal(after[name]) for name in before)
        resumed.training_parameters.max_steps = 4
        resumed.fit()
        found[f"from {source} to {target}"] = is_equal and resumed.global_step == 4
    return found


def trained_to(root: Path, device: Literal["cpu", "cuda"], step: int) -> NetTrainer:
    """Train up to a step, from the newest checkpoint if there is one."""
    parameters = DeviceParameters.SINGLE_DEVICE(device=device)
    callbacks: list[Callback[Any]] = [CheckpointCallback()]
    trainer = NetTrainer(net_config(root, parameters, callbacks, training={"max_steps": step}))
    trainer.fit()
    return trainer
