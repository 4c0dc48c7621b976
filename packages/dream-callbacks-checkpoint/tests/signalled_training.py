"""A script that trains with loader workers until a signal ends it, as a user's would.

    python signalled_training.py ROOT OPTIONS

OPTIONS is JSON: fields of DataLoader (`multiprocessing_context` by name), and `max_steps`. Writes
`ROOT/ready-RANK` once it is training, and `ROOT/steps-RANK`: the first and the last step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from dream_callbacks.checkpoint import CheckpointCallback, CheckpointParameters
from dream_trainer.callbacks import Callback, Every
from dream_trainer.testing import TinyTrainer, tiny_config

READY_AFTER = 3
"""Steps: the workers have started then."""


class Plain:
    def __init__(self, loader: Any) -> None:
        self.inner = loader

    def loader(self) -> Any:
        return self.inner


class Wrapped(Plain):
    """A user's wrapper of a DataLoader, which starts its workers later."""

    def loader(self) -> Any:
        return self

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Any:
        yield from self.inner


class WithWorkers(TinyTrainer):
    options: dict[str, Any]

    def configure_dataloaders(self) -> Any:
        train, _ = super().configure_dataloaders()
        loader: Any = train
        options = {**self.options}
        kind = Wrapped if options.pop("wrapped", False) else Plain
        return kind(
            DataLoader(loader.dataset, sampler=loader.sampler, batch_size=2, **options)
        ).loader()


class Marks(Callback[TinyTrainer]):
    """Writes files that tell the test the progress of the run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def pre_fit(self) -> None:
        self.first_step = self.trainer.global_step

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        time.sleep(0.02)
        if self.trainer.global_step == self.first_step + READY_AFTER:
            mark = self.root / f"ready-{self.trainer.world.rank}"
            mark.with_suffix(".part").write_text(str(os.getpid()))
            mark.with_suffix(".part").rename(mark)

    def post_fit(self) -> None:
        steps = [self.first_step, self.trainer.global_step]
        (self.root / f"steps-{self.trainer.world.rank}").write_text(json.dumps(steps))


def main() -> None:
    root, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    parameters = CheckpointParameters(every=Every(steps=10**6), keep_last=None)
    config = tiny_config(
        root,
        [Marks(root), CheckpointCallback(parameters)],
        n_epochs=10**6,
        max_steps=options.pop("max_steps", None),
    )
    config.num_samples = 4096  # in one epoch: workers take seconds to start
    trainer = WithWorkers(config)
    trainer.options = options
    trainer.fit()


if __name__ == "__main__":
    main()
