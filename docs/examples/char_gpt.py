"""A small GPT learns to write like Python's language reference, one character at a time.

python docs/examples/char_gpt.py                                       one process
torchrun --nproc-per-node=2 docs/examples/char_gpt.py                  two with a copy each (DDP)
torchrun --nproc-per-node=2 docs/examples/char_gpt.py --fsdp           two that share one (FSDP)
"""

import argparse
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional as F

from dream_callbacks.logging import JSONLinesSink, TensorBoardSink, WandBSink
from dream_trainer import DreamTrainer, DreamTrainerConfig, callbacks
from dream_trainer.configs import CheckpointParameters, DeviceParameters, TrainingParameters
from dream_trainer.entrypoint import entrypoint

TEXT = "\n".join(topics.values())  # comes with every Python
CHARACTERS = sorted(set(TEXT))
CONTEXT, WIDTH, NUM_HEADS, NUM_BLOCKS = 64, 96, 3, 3
BATCH_SIZE = 16  # over all ranks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):  # (B, T, C)
        qkv = self.qkv(self.norm_1(x)).unflatten(2, (3, NUM_HEADS, -1))  # (B, T, 3, heads, C/heads)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = (
            nn.Embedding(len(CHARACTERS), WIDTH),
            nn.Embedding(CONTEXT, WIDTH),
        )
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.head = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(CHARACTERS), bias=False)
        )
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens):  # (B, T) -> (B, T, V)
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class CharGPT(DreamTrainer):
    def configure_models(self):
        self.model = GPT()

    def configure_optimizers(self):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.99))

    def configure_schedulers(self):
        steps = self.training_parameters.max_steps
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.05, cycle_momentum=False
        )

    def configure_dataloaders(self):
        tokens = torch.tensor([CHARACTERS.index(character) for character in TEXT])
        train, val = tokens.tensor_split([len(tokens) * 9 // 10])
        train, val = (part.unfold(0, CONTEXT + 1, CONTEXT) for part in (train, val))
        return self.loader(train, BATCH_SIZE, shuffle=True), self.loader(val, BATCH_SIZE)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        return {"val_loss": self.loss(batch)}

    def loss(self, batch):  # in nats per character
        logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def sample(self, start, num_characters, temperature=0.6):
        tokens = torch.tensor([[CHARACTERS.index(c) for c in start]], device=self.world.device)
        generator = torch.Generator(self.world.device).manual_seed(0)  # equal on all ranks
        for _ in range(num_characters):
            logits = self.model(tokens[:, -CONTEXT:])[:, -1] / temperature
            choice = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, choice], dim=1)
        return "".join(CHARACTERS[i] for i in tokens[0].tolist())


class LastValidation(callbacks.Callback):
    """A callback of one's own: keeps the last validation loss, in checkpoints too."""

    loss = float("nan")

    def post_validation_epoch(self, result):
        self.loss = float(result["val_loss"])

    def state_dict(self):
        return {"loss": self.loss}

    def load_state_dict(self, state_dict):
        self.loss = state_dict["loss"]


@entrypoint
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fsdp", action="store_true", help="shard the model over the ranks")
    parser.add_argument("--max-steps", type=int, default=1600)
    options = parser.parse_args()

    validation = LastValidation()
    sinks = [JSONLinesSink(), TensorBoardSink(), WandBSink(mode="offline")]
    every_400_steps = CheckpointParameters(every=callbacks.Every(steps=400))
    config = DreamTrainerConfig(
        project="quickstart",
        experiment="char-gpt-fsdp" if options.fsdp else "char-gpt",
        device_parameters=DeviceParameters.FSDP() if options.fsdp else DeviceParameters(),
        training_parameters=TrainingParameters(max_steps=options.max_steps, gradient_clip_val=1.0),
        callbacks=callbacks.CallbackCollection(
            [
                callbacks.TrainerSummary(),
                callbacks.ProgressBar(metric="loss"),
                callbacks.LoggerCallback(log_every_n_train_batches=20, sinks=sinks),
                callbacks.LRLoggerCallback(),
                callbacks.ProfileCallback(),
                callbacks.OptimizeFSDP(),
                validation,
                callbacks.CheckpointCallback(every_400_steps),
            ]
        ),
    )
    trainer = CharGPT(config)
    trainer.fit()

    # On all ranks: with FSDP, each holds a part of the model.
    sample = trainer.sample("The statement ", 400)
    if trainer.world.is_global_zero:
        bin_dir, run_dir = os.path.relpath(Path(sys.executable).parent), trainer.run_dir
        print(f"""
{sample}

validation loss  {validation.loss:.3f} nats per character
checkpoints      ls {run_dir}/checkpoints
logs             {bin_dir}/tensorboard --logdir {run_dir}
trace            the same, in the tab PYTORCH_PROFILER; its file: ls {run_dir}/profile
more logs        tail {run_dir}/log.jsonl; {bin_dir}/wandb sync {run_dir}/wandb/latest-run""")
    trainer.world.shutdown()


if __name__ == "__main__":
    main()
