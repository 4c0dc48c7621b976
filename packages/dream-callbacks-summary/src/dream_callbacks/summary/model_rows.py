"""Rows of the model table: modules down to a depth, with equal blocks merged into one row."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_WRAPPED = ("_orig_mod", "module")
"""Attribute names of the wrapped module in torch.compile and DistributedDataParallel."""


@dataclass(frozen=True)
class Row:
    """A row of the model table.

    A shared tensor counts in the first row that has it, so that the rows of a level and the
    model's own parameters add up.

    Args:
        name: Name of the module in its parent; "blocks.0-5 (6 ×)" for several equal ones.
        kind: Class name; "Parameter" for a parameter that a module holds directly.
        level: Depth in the table; 0 for a model.
        num_parameters: Number of parameter elements, over all ranks.
        num_trainable: Number of elements that require gradients.
        num_bytes: Bytes of parameters and buffers on this rank.
        dtypes: Dtypes of the parameters.
        placements: Placements of the parameters: "replicated", "sharded (dp_shard)", …
        tied_to: Parameters shared with an earlier row.
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


def model_rows(models: Mapping[str, nn.Module], depth: int) -> Iterator[Row]:
    """Rows of the models, each followed by those of its modules; then a total, if several.

    Needs no forward pass, values or other ranks: parameters may be on the meta device, sharded,
    or both.

    Args:
        models: Models by name.
        depth: Levels of modules to show below a model. Containers such as ModuleList don't count
            as a level.
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
    """Equal modules or parameters that share a row.

    Args:
        name: Name of the row.
        members: Paths, starting with the model's name, and modules or parameters.
    """

    name: str
    members: tuple[tuple[str, nn.Module | nn.Parameter], ...]


def _rows(group: _Group, depth: int, level: int, owners: Mapping[int, str]) -> Iterator[Row]:
    yield _row(group, _class_name(group.members[0][1]), level, owners)
    if level < depth:
        for part in _child_groups(group):
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
                tied[_without_wrappers(owner.removeprefix(f"{model_name}."))] = None
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
    """Number of elements over all ranks; 0 for a lazy tensor, whose shape is unknown."""
    return 0 if is_lazy(tensor) else tensor.numel()


def placement(tensor: Tensor) -> str:
    """Placement of a tensor: "replicated", or "sharded" with the axes of the mesh."""
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


# Traversal


def _child_groups(group: _Group) -> list[_Group]:
    """Groups for the rows below a row, with equal neighbors merged."""
    parallel = zip(
        *(list(_direct_members(path, member)) for path, member in group.members), strict=True
    )
    parts = [_Group(places[0][0], tuple(member for _, member in places)) for places in parallel]
    return [_merged(equal) for equal in _equal_runs(parts)]


def _direct_members(
    path: str, member: nn.Module | nn.Parameter
) -> Iterator[tuple[str, tuple[str, nn.Module | nn.Parameter]]]:
    """Direct parameters and children of a module that has children: names, paths, members."""
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
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and not _has_own_parameters(child):
            for inner_name, inner in _children(f"{path}.{name}", child):
                yield f"{name}.{inner_name}", inner
        else:
            yield name, (f"{path}.{name}", child)


def _equal_runs(parts: Sequence[_Group]) -> Iterator[list[_Group]]:
    """Lists of consecutive groups that are equal and numbered consecutively."""
    run: list[_Group] = []
    for part in parts:
        if run and not _continues(run[-1], part):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _continues(one: _Group, next_one: _Group) -> bool:
    (prefix, number), (next_prefix, next_number) = map(_split_index, (one.name, next_one.name))
    return (
        number is not None
        and next_number == number + 1
        and prefix == next_prefix
        and _signature(one.members[0][1]) == _signature(next_one.members[0][1])
    )


def _merged(run: Sequence[_Group]) -> _Group:
    if len(run) == 1:
        return run[0]
    name = f"{run[0].name}-{_split_index(run[-1].name)[1]} ({len(run)} ×)"
    return _Group(name, tuple(member for group in run for member in group.members))


def _split_index(name: str) -> tuple[str, int | None]:
    prefix, _, last = name.rpartition(".")
    return prefix, int(last) if last.isdigit() else None


def _signature(member: nn.Module | nn.Parameter) -> Hashable:
    """A key that is equal for modules with equal rows and equal rows below."""
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


# Modules and tensors


def _tensors(member: nn.Module | nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, without duplicates, with their paths in the module."""
    if isinstance(member, nn.Module):
        yield from member.named_parameters()
        yield from member.named_buffers()
    else:
        yield "", member


def _unwrapped(path: str, member: nn.Module | nn.Parameter) -> tuple[str, nn.Module | nn.Parameter]:
    """The module inside wrappers that have no parameters of their own."""
    while isinstance(member, nn.Module):
        children = list(member.named_children())
        if len(children) != 1 or children[0][0] not in _WRAPPED or _has_own_parameters(member):
            break
        path, member = f"{path}.{children[0][0]}", children[0][1]
    return path, member


def _has_own_parameters(module: nn.Module) -> bool:
    """Whether a module holds parameters directly."""
    return next(module.parameters(recurse=False), None) is not None


def _without_wrappers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPED)


def _class_name(member: nn.Module | nn.Parameter) -> str:
    _, member = _unwrapped("", member)
    if not isinstance(member, nn.Module):
        return "Parameter"
    cls = type(member)
    # fully_shard and replicate change a module's class to a generated subclass of the original.
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
    """This rank's part of a tensor."""
    distributed = _as_distributed(tensor)
    return tensor if distributed is None else distributed.to_local()
