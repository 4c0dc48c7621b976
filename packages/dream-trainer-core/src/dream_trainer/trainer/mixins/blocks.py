"""Blocks: the parts of a model that are sharded and checkpointed one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model that have parameters, innermost first.

    These are the modules in a ModuleList; in a ModuleDict or Sequential, the modules that consist
    of others, and all if they are of one class, as in `Sequential(Linear, Tanh, Linear)`. Parts of
    a Sequential inside a block are no blocks. A module that shares a parameter with the rest of the
    model is none either: a parameter can't be in two FSDP units.
    """
    found = dict.fromkeys(reversed(list(_blocks_in(model, is_in_block=False))))
    uses = Counter(id(p) for part in model.modules() for p in _own_parameters(part))
    return [block for block in found if not _shares_parameters(block, uses)]


def units_of(model: nn.Module) -> list[nn.Module]:
    """What FSDP shards with all that isn't sharded in it yet: the model if it has a `forward`.

    Otherwise it is a ModuleDict or ModuleList of such models.
    """
    if not _has_parameters(model):
        return []
    if not isinstance(model, (nn.ModuleList, nn.ModuleDict)) or _has_forward(model):
        return [model]
    return [unit for child in model.children() for unit in units_of(child)]


def tied_parameters(models: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of parameters that are one and the same, in groups of two or more."""
    names: dict[int, list[str]] = {}
    for model_name, model in models.items():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"{model_name}.{name}")
    return [group for group in names.values() if len(group) > 1]


def refuse_separated_parameters(
    tied_before: list[list[str]], models: Mapping[str, nn.Module]
) -> None:
    """Raise if sharding put copies of a tied parameter into different FSDP units.

    Args:
        tied_before: What `tied_parameters` returned before `apply_fully_shard`.
        models: The same models after it.

    Raises:
        ValueError: It names the parameters.
    """
    still_tied = {frozenset(group) for group in tied_parameters(models)}
    for group in tied_before:
        if frozenset(group) not in still_tied:
            raise ValueError(
                f"{' and '.join(group)} are one parameter, and apply_fully_shard puts them into "
                "different FSDP units; shard their modules as one unit, fully_shard([module_a, "
                "module_b], **config), or leave both to the unit of the whole model"
            )


def _blocks_in(module: nn.Module, *, is_in_block: bool) -> Iterator[nn.Module]:
    if _is_container(module, is_in_block=is_in_block):
        for child in module.children():
            if _is_container(child, is_in_block=is_in_block):
                yield from _blocks_in(child, is_in_block=is_in_block)
            elif _is_member(module, child):
                yield child
                yield from _blocks_in(child, is_in_block=True)
            else:
                yield from _blocks_in(child, is_in_block=is_in_block)
    else:
        for child in module.children():
            yield from _blocks_in(child, is_in_block=is_in_block)


def _is_container(module: nn.Module, *, is_in_block: bool) -> bool:
    if isinstance(module, nn.Sequential):
        return not is_in_block and type(module).forward is nn.Sequential.forward
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _is_member(container: nn.Module, child: nn.Module) -> bool:
    """Whether a module in a container is a block."""
    if not _has_parameters(child):
        return False
    if isinstance(container, nn.ModuleList) or any(True for _ in child.children()):
        return True
    return len({type(each) for each in container.children() if _has_parameters(each)}) == 1


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    for parameter in module._parameters.values():  # noqa: SLF001  # with duplicates
        if parameter is not None:
            yield parameter


def _shares_parameters(block: nn.Module, uses: Counter[int]) -> bool:
    inside = Counter(id(p) for part in block.modules() for p in _own_parameters(part))
    return any(uses[parameter] > number for parameter, number in inside.items())
