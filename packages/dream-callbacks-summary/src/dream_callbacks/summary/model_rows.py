"""Rows of a model table: modules down to a depth, equal blocks in one row, numbers for each."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_WRAPPED = ("_orig_mod", "module")
"""What torch.compile and DistributedDataParallel call the module that they wrap."""


@dataclass(frozen=True)
class Row:
    """A line of a table of modules.

    What several modules share counts where it comes first, so that the rows of a level and a
    model's own parameters add up.

    Args:
        name: Of the module, in the one above it; "blocks.0-5 (6 ×)" for several equal ones.
        kind: Its class; "Parameter" for a parameter that a module has beside its modules.
        level: How deep it stands in the table; 0 for a model.
        num_parameters: Numbers in its parameters, over all ranks.
        num_trainable: Those of them that get gradients.
        num_bytes: What its parameters and buffers take on this rank.
        dtypes: Of its parameters.
        placements: Where its parameters are: "replicated", "sharded (dp_shard)", …
        tied_to: Parameters that it shares with an earlier row.
    """

    name: str
    kind: str
    level: int
    num_parameters: int
    num_trainable: int
    num_bytes: int
    dtypes: tuple[str, ...]
    placements: tuple[str, ...]
    tied_to: tuple[str, ...]


def rows_of(models: Mapping[str, nn.Module], depth: int) -> Iterator[Row]:
    """The rows of some models, each followed by those of its modules; then all in one, if several.

    Needs neither a forward pass nor values nor other ranks: parameters may be on the meta device,
    sharded, or both.

    Args:
        models: By name.
        depth: How many levels of modules to show below a model. Containers such as ModuleList
            are no level of their own.
    """
    owners: dict[int, str] = {}
    for name, model in models.items():
        for path, tensor in _tensors(model):
            owners.setdefault(id(tensor), f"{name}.{path}")
    groups = [_Group(name, ((name, model),)) for name, model in models.items()]
    for group in groups:
        yield from _rows(group, depth, 0, owners)
    if len(groups) > 1:
        together = _Group("total", tuple(member for group in groups for member in group.members))
        yield _row(together, "", 0, owners)


@dataclass(frozen=True)
class _Group:
    """Modules, or parameters, that share a row: equal ones, at parallel places.

    Args:
        name: Of the row.
        members: Each with its path, which begins with the model's name.
    """

    name: str
    members: tuple[tuple[str, nn.Module | nn.Parameter], ...]


def _rows(group: _Group, depth: int, level: int, owners: Mapping[int, str]) -> Iterator[Row]:
    yield _row(group, _kind(group.members[0][1]), level, owners)
    if level < depth:
        for part in _parts(group):
            yield from _rows(part, depth, level + 1, owners)


def _row(group: _Group, kind: str, level: int, owners: Mapping[int, str]) -> Row:
    counted: dict[int, Tensor] = {}
    tied: dict[str, None] = {}
    for path, member in group.members:
        for _, tensor in _tensors(member):
            owner = owners[id(tensor)]
            if any(f"{owner}.".startswith(f"{own}.") for own, _ in group.members):
                counted[id(tensor)] = tensor
            elif isinstance(tensor, nn.Parameter):
                model_name = path.partition(".")[0]
                tied[_shown(owner.removeprefix(f"{model_name}."))] = None
    parameters = [tensor for tensor in counted.values() if isinstance(tensor, nn.Parameter)]
    return Row(
        name=group.name,
        kind=kind,
        level=level,
        num_parameters=sum(map(num_elements, parameters)),
        num_trainable=sum(num_elements(p) for p in parameters if p.requires_grad),
        num_bytes=sum(num_elements(_local(t)) * t.dtype.itemsize for t in counted.values()),
        dtypes=tuple(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parameters)),
        placements=tuple(dict.fromkeys(map(placement, parameters))),
        tied_to=tuple(tied),
    )


def num_elements(tensor: Tensor) -> int:
    """Numbers in a tensor, over all ranks; 0 for a lazy one, whose shape isn't known yet."""
    return 0 if is_lazy(tensor) else tensor.numel()


def placement(tensor: Tensor) -> str:
    """Over which axes of the mesh a tensor is sharded, if it is."""
    sharded = _as_distributed(tensor)
    if sharded is None:
        return "replicated"
    mesh, names = sharded.device_mesh, sharded.device_mesh.mesh_dim_names
    axes = [
        names[axis] if names is not None else f"axis {axis}"
        for axis, kind in enumerate(sharded.placements)
        if not kind.is_replicate() and mesh.size(axis) > 1
    ]
    return f"sharded ({', '.join(axes)})" if axes else "replicated"


# Walking


def _parts(group: _Group) -> list[_Group]:
    """The rows below a row: what its modules consist of, equal neighbours together."""
    parallel = zip(*(list(_inside(path, member)) for path, member in group.members), strict=True)
    parts = [_Group(places[0][0], tuple(member for _, member in places)) for places in parallel]
    return [_joined(equal) for equal in _runs(parts)]


def _inside(
    path: str, member: nn.Module | nn.Parameter
) -> Iterator[tuple[str, tuple[str, nn.Module | nn.Parameter]]]:
    """What a module with modules in it consists of: names, and their paths and parts."""
    path, module = _unwrapped(path, member)
    if not isinstance(module, nn.Module):
        return
    children = list(_children(path, module))
    if children:
        for name, parameter in module.named_parameters(recurse=False):
            yield name, (f"{path}.{name}", parameter)
        yield from children


def _children(path: str, module: nn.Module) -> Iterator[tuple[str, tuple[str, nn.Module]]]:
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and not _has_own(child):
            for inner_name, inner in _children(f"{path}.{name}", child):
                yield f"{name}.{inner_name}", inner
        else:
            yield name, (f"{path}.{name}", child)


def _runs(parts: Sequence[_Group]) -> Iterator[list[_Group]]:
    """Neighbours that are equal and numbered one after the other, in lists."""
    run: list[_Group] = []
    for part in parts:
        if run and not _continues(run[-1], part):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _continues(one: _Group, next_one: _Group) -> bool:
    (prefix, number), (next_prefix, next_number) = map(_numbered, (one.name, next_one.name))
    return (
        number is not None
        and next_number == number + 1
        and prefix == next_prefix
        and _signature(one.members[0][1]) == _signature(next_one.members[0][1])
    )


def _joined(run: Sequence[_Group]) -> _Group:
    if len(run) == 1:
        return run[0]
    name = f"{run[0].name}-{_numbered(run[-1].name)[1]} ({len(run)} ×)"
    return _Group(name, tuple(member for group in run for member in group.members))


def _numbered(name: str) -> tuple[str, int | None]:
    prefix, _, last = name.rpartition(".")
    return prefix, int(last) if last.isdigit() else None


def _signature(member: nn.Module | nn.Parameter) -> Hashable:
    """Equal for modules that would have equal rows, and equal rows below."""
    modules = member.named_modules() if isinstance(member, nn.Module) else ()
    return (
        tuple((name, type(module)) for name, module in modules),
        tuple(
            (
                name,
                None if is_lazy(tensor) else tensor.shape,
                tensor.dtype,
                tensor.requires_grad,
                placement(tensor),
            )
            for name, tensor in _tensors(member)
        ),
    )


# What a module is


def _tensors(member: nn.Module | nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once, by their path in the module."""
    if isinstance(member, nn.Module):
        yield from member.named_parameters()
        yield from member.named_buffers()
    else:
        yield "", member


def _unwrapped(path: str, member: nn.Module | nn.Parameter) -> tuple[str, nn.Module | nn.Parameter]:
    """The module inside of wrappers that have nothing of their own."""
    while isinstance(member, nn.Module):
        children = list(member.named_children())
        if len(children) != 1 or children[0][0] not in _WRAPPED or _has_own(member):
            break
        path, member = f"{path}.{children[0][0]}", children[0][1]
    return path, member


def _has_own(module: nn.Module) -> bool:
    """Whether a module has parameters beside those of its modules."""
    return next(module.parameters(recurse=False), None) is not None


def _shown(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPED)


def _kind(member: nn.Module | nn.Parameter) -> str:
    _, member = _unwrapped("", member)
    if not isinstance(member, nn.Module):
        return "Parameter"
    cls = type(member)
    # fully_shard and replicate put a module into a class of their own, named after the old one.
    made_of = cls.__bases__[-1]
    is_made = len(cls.__bases__) > 1 and cls.__name__ in (
        f"{prefix}{made_of.__name__}" for prefix in ("FSDP", "Replicate", "DDP")
    )
    return made_of.__name__ if is_made else cls.__name__


def _as_distributed(tensor: Tensor) -> Any:
    """The tensor if it is a DTensor, else None."""
    if type(tensor) in (Tensor, nn.Parameter):
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    distributed = _as_distributed(tensor)
    return tensor if distributed is None else distributed.to_local()
