"""Predictions: outputs of `predict_step`, per batch or gathered per sample."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dream_trainer.trainer.evaluation_sets import refuse_problems
from dream_trainer.trainer.samples import leading_sizes
from dream_trainer.world import cpu_collectives
from dream_trainer.world.world import World

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class Predictions:
    """The outputs of a loader's batches, in host memory.

    Args:
        world: The ranks that predict.
        loader: This rank's loader.
        gather: Bring all outputs to rank 0, in the order of the data set. Collective then.

    Attributes:
        loader: The loader to read from.

    Raises:
        ValueError: On all ranks, with `gather`, if the order of samples isn't known.
    """

    def __init__(self, world: World, loader: Any, *, gather: bool) -> None:
        self.loader = loader
        self._world = world
        self._gathers = gather
        self._outputs: list[Any] = []
        self._samples: dict[int, Any] = {}
        self._indices: deque[Any] | None = None
        if gather:
            refuse_problems([_problem_of_order(loader, world.dp_size)], world)
            if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
                self.loader, self._indices = _recording(loader)

    def add(self, output: Any, num_samples: Any) -> dict[str, Any]:
        """Add the output of a batch, however many samples it has."""
        output = _on_host(output)
        if not self._gathers:
            self._outputs.append(output)
        else:
            self._samples.update(self._by_index(output))
        return {"prediction": output}

    def finish(self) -> list[Any]:
        """The outputs, as `trainer.predict` returns them. Collective with `gather`."""
        if not self._gathers:
            return self._outputs
        is_first = self._world.tp_rank == self._world.cp_rank == self._world.pp_rank == 0
        mine = self._samples if is_first else {}  # ranks of one part have the same
        parts = cpu_collectives.gathered_objects_on_zero(mine, self._world.group())
        samples = {index: sample for part in parts or () for index, sample in part.items()}
        return [samples[index] for index in sorted(samples)]

    def _by_index(self, output: Any) -> Iterator[tuple[int, Any]]:
        if self._indices is None:  # a stream: its order is that of the data
            begin = len(self._samples)
            sizes = [len(output)] if isinstance(output, list) else leading_sizes(output)
            indices: Any = range(begin, begin + next(iter(sizes), 1))
        else:
            indices = self._indices.popleft()
        if not isinstance(indices, Iterable):  # a DataLoader with batch_size=None
            yield operator.index(indices), output
            return
        indices = list(map(operator.index, indices))
        for position, index in enumerate(indices):
            yield index, _item(output, position, len(indices))


def default_prediction(trainer: BaseTrainer, batch: Any) -> Any:
    """The only model's forward; see `predict_step`."""
    models = trainer.named_models()
    if len(models) != 1:
        raise NotImplementedError(
            f"{type(trainer).__name__} has {len(models)} models ({', '.join(models)}) and no "
            "predict_step; write one"
        )
    (model,) = models.values()
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _on_host(output: Any) -> Any:
    """The output with its tensors in host memory, whole and detached."""
    if isinstance(output, Tensor):
        from torch.distributed.tensor import DTensor

        whole = output.full_tensor() if isinstance(output, DTensor) else output
        return whole.detach().to("cpu", copy=True)
    if isinstance(output, Mapping):
        return {key: _on_host(value) for key, value in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_on_host(value) for value in output))
    if isinstance(output, (list, tuple)):
        return type(output)(_on_host(value) for value in output)
    return output


def _item(output: Any, position: int, size: int) -> Any:
    """What belongs to one sample of a batch."""
    if isinstance(output, Mapping):
        return {key: _item(value, position, size) for key, value in output.items()}
    if isinstance(output, tuple):
        items = [_item(value, position, size) for value in output]
        return type(output)(*items) if hasattr(output, "_fields") else tuple(items)
    if isinstance(output, Tensor) or hasattr(output, "shape"):
        if len(output.shape) and output.shape[0] == size:
            return output[position].clone() if isinstance(output, Tensor) else output[position]
        what = f"has shape {tuple(output.shape)}"
    elif isinstance(output, list):
        if len(output) == size:
            return output[position]
        if any(isinstance(value, Tensor) for value in output):
            return [_item(value, position, size) for value in output]
        what = f"is a list of {len(output)}"
    else:
        what = f"is a {type(output).__qualname__}"
    raise ValueError(
        f"predict(gather=True) needs an output with one item for each of the {size} samples of a "
        f"batch, and one {what}; return tensors with samples along dimension 0, or lists, or use "
        "gather=False"
    )


def _problem_of_order(loader: Any, num_ranks: int) -> str | None:
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    if num_ranks == 1 and (is_stream or not isinstance(loader, DataLoader)):
        return None
    if type(loader) is DataLoader and not is_stream:
        return None
    return (
        f"predict(gather=True) can't know which samples of the data set a {type(loader).__name__} "
        "gives to which rank; use self.loader(dataset, batch_size), a DataLoader over a data set "
        "with indices, or gather=False"
    )


class _Recorder:
    """An iterable that keeps what it has given, for a DataLoader's sampler."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.given: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        for each in self.sampler:
            self.given.append(each)
            yield each

    def __len__(self) -> int:
        return len(self.sampler)


def _recording(loader: DataLoader[Any]) -> tuple[DataLoader[Any], deque[Any]]:
    """A DataLoader that gives the same batches, and their indices in order."""
    options = {
        name: getattr(loader, name)
        for name in (
            *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn"),
            *("multiprocessing_context", "generator", "prefetch_factor"),
        )
    }
    if loader.batch_sampler is None:
        recorder = _Recorder(loader.sampler)
        return DataLoader(
            loader.dataset, batch_size=None, sampler=recorder, **options
        ), recorder.given
    recorder = _Recorder(loader.batch_sampler)
    return DataLoader(loader.dataset, batch_sampler=recorder, **options), recorder.given
