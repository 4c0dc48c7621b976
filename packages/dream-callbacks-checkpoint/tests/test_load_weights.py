"""load_weights: the weights of any checkpoint in a plain module, without a trainer."""

from __future__ import annotations

import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_files import damage
from tiny_runs import tiny
from torch import Tensor, nn
from training import different

from dream_callbacks.checkpoint import CheckpointError, load_weights
from dream_callbacks.checkpoint.io.local_filesystem import LocalFilesystem
from dream_trainer.callbacks import Callback, Every
from dream_trainer.testing import TinyTrainer
from dream_trainer.testing.trainers import TinyModel

ACCURACY = {4: 0.5, 8: 0.9, 12: 0.7, 16: 0.6}


class Tied(nn.Module):
    """Two layers with one weight, a buffer that isn't saved, and an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("angles", torch.arange(3.0), persistent=False)
        self.words: dict[str, Any] = {}

    def get_extra_state(self) -> dict[str, Any]:
        return self.words

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.words = state


class Steps(TinyTrainer):
    """Each value of `model` is the step at which it was saved."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(self.global_step + 1.0)
        return result

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"accuracy": torch.tensor(ACCURACY.get(self.global_step, 0.0))}


class Several(Steps):
    """With a second model."""

    def configure_models(self) -> None:
        super().configure_models()
        self.tied = Tied()
        self.tied.words = {"vocabulary": ("a", "b"), "size": torch.tensor([2])}


def train(root: Path, *callbacks: Any, **fields: Any) -> TinyTrainer:
    fields = {"kind": Steps, "training": {"val_every_n_steps": 4}, **fields}
    best = {"every": Every(steps=4), "monitor": "accuracy", "mode": "max"}
    trainer = tiny(root, *callbacks, **{**best, **fields})
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run")).run_dir


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> TinyTrainer:
    return train(tmp_path_factory.mktemp("several"), kind=Several, n_epochs=1)


def step_of(module: nn.Module) -> float:
    """The one value that all parameters have."""
    (value,) = {value for p in module.parameters() for value in p.flatten().tolist()}
    return float(value)


def model(width: int = 8) -> TinyModel:
    return TinyModel(width, 2)


@pytest.mark.parametrize(
    ("arguments", "step"),
    [
        ({}, 8),
        ({"which": "best", "mode": "min"}, 4),
        ({"which": "last"}, 16),
        ({"which": "min"}, 4),
        ({"which": 12}, 12),
    ],
    ids=str,
)
def test_any_checkpoint_can_be_chosen(run_dir: Path, arguments: Any, step: int) -> None:
    module = model()

    report = load_weights(run_dir, module, **arguments)

    assert step_of(module) == step
    assert report.checkpoint == run_dir / "checkpoints" / f"step-{step:010d}"
    assert report.loaded == tuple(sorted(module.state_dict()))
    assert report.missing == report.unused == ()


def test_the_path_may_be_the_folder_or_one_checkpoint(run_dir: Path) -> None:
    module, folder = model(), run_dir / "checkpoints"

    load_weights(str(folder), module)
    assert step_of(module) == 8
    load_weights(folder / "step-0000000012", module)
    assert step_of(module) == 12
    with pytest.raises(ValueError, match=r"which=4, and .* is the checkpoint of step 12"):
        load_weights(folder / "step-0000000012", module, 4)


@pytest.mark.parametrize("on_meta", [False, True])
def test_the_path_may_be_a_url(tmp_path: Path, on_meta: bool) -> None:
    pytest.importorskip("fsspec")
    url = f"memory://{tmp_path.name}"
    trainer = train(tmp_path, root_dir=url, n_epochs=1)
    with torch.device("meta" if on_meta else "cpu"):
        module = model()

    load_weights(f"{url}/{trainer.project}/{trainer.group}/{trainer.experiment}", module)

    assert step_of(module) == 8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"which": 5}, "which=5 asks for step-0000000005, which doesn't exist"),
        ({"monitor": "bleu", "mode": "max"}, r'they have accuracy.*or which="last"'),
        ({"monitor": "bleu"}, "whether a low or a high value"),
        ({"model": "generator"}, "has no model 'generator'; its models: 'model'"),
    ],
    ids=["step", "metric", "mode", "model"],
)
def test_what_cannot_be_chosen_is_an_error(run_dir: Path, arguments: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        load_weights(run_dir, model(), **arguments)


def test_wrong_arguments_are_errors(run_dir: Path) -> None:
    with pytest.raises(ValueError, match="which='newest'"):
        load_weights(run_dir, model(), "newest")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="module is a PosixPath"):
        load_weights(model(), run_dir)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="isn't a directory"):
        load_weights(run_dir / "nowhere", model())


# Several models


def test_one_of_several_models_is_chosen_by_name(several: TinyTrainer) -> None:
    module = model()

    load_weights(several.run_dir, module, "last", model="model")

    assert step_of(module) == 8


def test_without_a_name_the_names_are_listed(several: TinyTrainer) -> None:
    with pytest.raises(CheckpointError, match=r"has 2 models: 'model', 'tied'; choose one, as"):
        load_weights(several.run_dir, model())


def test_everything_in_a_state_dict_is_loaded(several: TinyTrainer) -> None:
    module = Tied()
    with torch.no_grad():
        module.a.weight.fill_(0)

    load_weights(several.run_dir, module, model="tied")

    loaded = {f"tied.{k}": v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    assert loaded.keys() == {k for k in weights_of(several) if k.startswith("tied.")}
    assert not different(loaded, {k: weights_of(several)[k] for k in loaded})
    assert module.b.weight is module.a.weight
    assert module.words["vocabulary"] == ("a", "b")
    assert torch.equal(module.words["size"], torch.tensor([2]))


def weights_of(trainer: TinyTrainer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, module in trainer.named_models().items()
        for key, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }


# Modules that don't fit


class WiderHead(TinyModel):
    def __init__(self) -> None:
        super().__init__(8, 2)
        self.head = nn.Linear(8, 2, bias=False)
        self.gate = nn.Linear(1, 1)


def test_a_module_that_does_not_fit_is_refused_and_unchanged(run_dir: Path) -> None:
    module = WiderHead()
    before = {key: value.clone() for key, value in module.state_dict().items()}

    with pytest.raises(CheckpointError) as found:
        load_weights(run_dir, module)

    text = str(found.value)
    assert f"{run_dir}/checkpoints/step-0000000008 doesn't fit the module, a WiderHead" in text
    assert "only in the checkpoint: head.bias\n" in text
    assert "only in the module: gate.bias, gate.weight\n" in text
    assert "of another shape: head.weight [1, 8] → [2, 8]\n" in text
    assert not different(module.state_dict(), before)
    with pytest.raises(CheckpointError, match="of another shape"):
        load_weights(run_dir, module, strict=False)
    assert not different(module.state_dict(), before)


def test_strict_is_that_of_load_state_dict(run_dir: Path) -> None:
    module = WiderHead()
    module.head = nn.Linear(8, 1, bias=False)
    gate = module.gate.weight.clone()

    report = load_weights(run_dir, module, strict=False)

    assert report.missing == ("gate.bias", "gate.weight")
    assert report.unused == ("head.bias",)
    assert step_of(module.blocks) == step_of(module.head) == 8
    assert torch.equal(module.gate.weight, gate)
    with pytest.raises(CheckpointError, match="no name is in both"):
        load_weights(run_dir, nn.Linear(1, 1), strict=False)


def test_tied_weights_that_were_trained_apart_are_refused(run_dir: Path) -> None:
    class Apart(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.model.blocks[1].bias = nn.Parameter(self.model.blocks[0].bias.detach().clone())

    trainer = tiny(run_dir.parent / "apart", kind=Apart, n_epochs=1)
    trainer.fit()
    module = model()
    module.blocks[1].weight = module.blocks[0].weight
    before = module.blocks[0].weight.clone()

    with pytest.raises(CheckpointError, match=r"blocks.0.weight, .*blocks.1.weight have different"):
        load_weights(trainer.run_dir, module, "last")
    assert torch.equal(module.blocks[0].weight, before)


# Dtypes, devices, wrappers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_cast_into_the_tensors_of_the_module(run_dir: Path, dtype: torch.dtype) -> None:
    module = model().to(dtype).eval()
    module.embed.weight.requires_grad_(False)
    tensors = dict(module.named_parameters())

    load_weights(run_dir, module)

    assert step_of(module) == 8
    assert all(p is tensors[n] and p.dtype == dtype for n, p in module.named_parameters())
    assert not module.training
    assert not module.embed.weight.requires_grad


def test_a_dtype_that_loses_the_value_is_refused(run_dir: Path) -> None:
    module = model()
    module.embed.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int64), requires_grad=False)

    with pytest.raises(CheckpointError, match=r"embed.weight torch.float32 → torch.int64"):
        load_weights(run_dir, module)


def test_a_module_on_meta_gets_its_tensors(run_dir: Path) -> None:
    with torch.device("meta"):
        module = model().to(torch.bfloat16)
        module.blocks[1].weight = module.blocks[0].weight
        module.embed.weight.requires_grad_(False)

        load_weights(run_dir, module)

    assert step_of(module) == 8
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert isinstance(module.head.weight, nn.Parameter)
    assert not module.embed.weight.requires_grad
    assert module.blocks[1].weight is module.blocks[0].weight
    assert module.blocks[1].weight.requires_grad


def test_what_would_stay_on_meta_is_an_error(several: TinyTrainer) -> None:
    with torch.device("meta"):
        module = Tied()

    with pytest.raises(CheckpointError, match="not in the checkpoint: angles"):
        load_weights(several.run_dir, module, model="tied")
    assert module.a.weight.is_meta
    module.angles = torch.arange(3.0)
    load_weights(several.run_dir, module, model="tied")
    assert not different(
        {"a": module.a.weight, "b": module.b.weight},
        {"a": several.tied.a.weight, "b": several.tied.b.weight},
    )


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel], ids=["compile", "parallel"])
def test_prefixes_of_wrappers_do_not_matter(run_dir: Path, wrap: Any) -> None:
    module, inner = model(), model()
    inner.blocks[0] = wrap(inner.blocks[0])

    report = load_weights(run_dir, wrap(module))
    load_weights(run_dir, inner)

    assert "blocks.0.weight" in report.loaded
    assert step_of(module) == step_of(inner) == 8


def test_prefixes_in_a_checkpoint_do_not_matter(tmp_path: Path) -> None:
    class Wrapped(Steps):
        def model_state_dict(self) -> dict[str, Any]:
            return {"model": nn.DataParallel(compiled(self.model)).state_dict()}

    trainer = train(tmp_path, kind=Wrapped, training={"max_steps": 1})
    module = model()

    load_weights(trainer.run_dir, module, "last")

    assert step_of(module) == 1


def test_a_child_called_module_is_not_a_wrapper(tmp_path: Path) -> None:
    class Child(Steps):
        def configure_models(self) -> None:
            super().configure_models()
            self.child = nn.ModuleDict({"module": nn.Linear(2, 2)})

    trainer = train(tmp_path, kind=Child, training={"max_steps": 1})
    module = nn.DataParallel(nn.ModuleDict({"module": nn.Linear(2, 2)}))

    load_weights(trainer.run_dir, module, "last", model="child")

    assert torch.equal(module.module["module"].weight, trainer.child["module"].weight)


def test_a_lazy_module_gets_its_shapes(run_dir: Path) -> None:
    module = model()
    module.embed = nn.LazyLinear(8)

    load_weights(run_dir, module)

    assert step_of(module) == 8
    assert module.embed.weight.shape == (8, 4)


# Damage, and runs that are training


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(run_dir, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_next_best_is_loaded_if_the_best_is_damaged(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(copied / "checkpoints" / "step-0000000008" / "__0_0.distcp")
    module = model()

    load_weights(copied, module)

    assert step_of(module) == 12
    assert "step-0000000008 is damaged: " in caplog.text
    with pytest.raises(CheckpointError, match=r"which=8 allows is intact .*checksum"):
        load_weights(copied, module, 8)


def test_a_read_that_fails_halfway_says_that_the_module_changed(copied: Path) -> None:
    file = copied / "checkpoints" / "step-0000000016" / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))

    with pytest.raises(CheckpointError, match="the module has a part of its weights now"):
        load_weights(copied, model(), "last", verify=False)


def test_weights_with_nan_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Steps):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            result = super().training_step(batch, batch_idx)
            nn.init.constant_(self.model.head.bias, torch.nan)
            return result

    trainer = train(tmp_path, kind=Broken, training={"max_steps": 1})

    load_weights(trainer.run_dir, model(), "last")

    assert "step-0000000001 has NaN in its weights" in caplog.text


def test_the_choice_is_made_again_if_the_checkpoint_was_deleted(
    copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reading = LocalFilesystem.reading

    def deleted_first(self: LocalFilesystem, folder: str) -> Any:
        if folder == "step-0000000008":
            shutil.rmtree(self.root / folder)
        return reading(self, folder)

    monkeypatch.setattr(LocalFilesystem, "reading", deleted_first)
    module = model()

    load_weights(copied, module)

    assert step_of(module) == 12
    assert "damaged" not in caplog.text


class Loads(Callback[TinyTrainer]):
    """Loads the newest checkpoint in another thread, again and again, while the run trains."""

    def pre_fit(self) -> None:
        self.found: list[float] = []
        self.error: Exception | None = None
        self.is_done = threading.Event()
        self.thread = threading.Thread(target=self.load)
        self.thread.start()

    def load(self) -> None:
        folder, module = self.trainer.run_dir / "checkpoints", model()
        try:
            while not self.is_done.is_set():
                if list(folder.glob("step-*")):
                    load_weights(folder, module, "last")
                    self.found.append(step_of(module))
        except Exception as error:  # noqa: BLE001  # raised by the test
            self.error = error

    def post_fit(self) -> None:
        self.is_done.set()
        self.thread.join()


def test_a_run_that_is_training_and_deleting_can_be_loaded_from(tmp_path: Path) -> None:
    loads = Loads()

    train(tmp_path, loads, every=Every(steps=1), keep_last=1, training={}, n_epochs=1)

    assert loads.error is None
    assert loads.found == sorted(loads.found)
    assert len(set(loads.found)) > 1


def test_nothing_is_written_or_unpickled(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickled")

    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(copied.rglob("*")) if p.is_file()}

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    before = files()

    load_weights(copied, model())

    assert files() == before
