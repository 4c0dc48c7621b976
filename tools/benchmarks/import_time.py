"""CPU time that Dream Trainer adds to the start of a training process.

Two promises: `import dream_trainer` costs at most 50 ms more than `import torch`, and a trainer's
first step comes at most 1 s after that of a plain loop. Each side runs in fresh processes, in
turns, so that other load slows both; the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass

TIMED = """
import time
{code}
print(time.process_time())
"""

PLAIN_LOOP = """
import torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
for x, y in torch.utils.data.DataLoader(data, batch_size=4, shuffle=True):
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    break
"""

TRAINER = """
import torch
from dream_trainer import DreamTrainer, DreamTrainerConfig
from dream_trainer.configs import TrainingParameters

class Tiny(DreamTrainer):
    def configure_models(self):
        self.model = torch.nn.Linear(4, 1)
    def configure_optimizers(self):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
    def configure_dataloaders(self):
        data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
        return torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.model(x), y)
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        return {"loss": loss}

Tiny(DreamTrainerConfig(training_parameters=TrainingParameters(max_steps=1))).fit()
"""


@dataclass(frozen=True)
class Comparison:
    """One promise and what was measured; all in milliseconds of CPU time.

    Args:
        what: What is compared.
        plain_ms: Median without Dream Trainer.
        ours_ms: Median with it.
        goal_ms: How much more it may be.
    """

    what: str
    plain_ms: float
    ours_ms: float
    goal_ms: float

    @property
    def difference_ms(self) -> float:
        """What Dream Trainer adds."""
        return self.ours_ms - self.plain_ms

    @property
    def is_kept(self) -> bool:
        """Whether the promise is."""
        return self.difference_ms <= self.goal_ms


def cpu_ms(code: str) -> float:
    """CPU time of a fresh process that runs `code`, start of the interpreter included."""
    command = [sys.executable, "-c", TIMED.format(code=code)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return 1000 * float(done.stdout.split()[-1])


def compare(what: str, plain: str, ours: str, goal_ms: float, repeats: int) -> Comparison:
    """Run both in turns, after one unmeasured run of each that fills the caches."""
    cpu_ms(plain)
    cpu_ms(ours)
    times = [(cpu_ms(plain), cpu_ms(ours)) for _ in range(repeats)]
    plain_ms, ours_ms = (statistics.median(side) for side in zip(*times, strict=True))
    return Comparison(what, plain_ms, ours_ms, goal_ms)


def main() -> int:
    """Measure, print; 1 if a promise isn't kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="processes of each side")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    comparisons = [
        compare("import", "import torch", "import dream_trainer", 50.0, arguments.repeats),
        compare("first step", PLAIN_LOOP, TRAINER, 1000.0, arguments.repeats),
    ]
    if arguments.json:
        print(json.dumps([asdict(each) | {"is_kept": each.is_kept} for each in comparisons]))
    else:
        print(f"{'CPU ms':12}{'plain':>8}{'ours':>8}{'more':>8}{'goal':>8}")
        for each in comparisons:
            numbers = (each.plain_ms, each.ours_ms, each.difference_ms, each.goal_ms)
            row = "".join(f"{number:8.0f}" for number in numbers)
            print(f"{each.what:12}{row}  {'' if each.is_kept else 'too much'}")
    return 0 if all(each.is_kept for each in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
