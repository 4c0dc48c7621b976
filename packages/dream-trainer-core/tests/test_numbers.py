"""What counts as a number."""

from __future__ import annotations

import enum
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch

from dream_trainer.numbers import as_float, as_number, is_number, is_readable_alone


class Level(enum.IntEnum):
    LOW = 1


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3),
        (2.5, 2.5),
        (True, True),
        (Fraction(1, 4), 0.25),
        (Level.LOW, 1),
        (Fraction(10**400), math.inf),
        (-Fraction(10**400), -math.inf),
        (10**400, 10**400),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_any_real_number_is_one(value: Any, number: float) -> None:
    assert is_number(value)
    assert as_number(value) == number
    assert type(as_number(value)) is type(number)
    assert as_float(value) == (math.inf if number == 10**400 else number)


@pytest.mark.parametrize(
    "value",
    [None, "1", b"1", 1j, Decimal(1), [1.0], (1.0,), {"a": 1.0}, float, object(), torch.float32],
    ids=lambda value: f"{value!r:.20}",
)
def test_anything_else_is_not(value: Any) -> None:
    assert not is_number(value)
    assert as_number(value) is None
    assert as_float(value) is None


def numpy_value(code: str) -> Any:
    numpy = pytest.importorskip("numpy")
    return eval(code, {"np": numpy})  # noqa: S307  # the tests' own, readable as their ids


@pytest.mark.parametrize(
    ("code", "number"),
    [
        ("np.float32(0.5)", 0.5),
        ("np.float64(0.5)", 0.5),
        ("np.float16(0.5)", 0.5),
        ("np.longdouble(0.5)", 0.5),
        ("np.int64(3)", 3),
        ("np.uint8(3)", 3),
        ("np.bool_(True)", True),
        ("np.array(0.5)", 0.5),
        ("np.array([3])", 3),
        ("np.array([[0.5]], dtype=np.float32)", 0.5),
        ("np.array([True])", True),
    ],
)
def test_scalars_and_arrays_of_one_element_of_numpy_are_numbers(code: str, number: float) -> None:
    value = numpy_value(code)

    assert is_number(value)
    assert as_number(value) == number
    assert type(as_number(value)) is type(number)


@pytest.mark.parametrize(
    "code",
    [
        "np.zeros(2)",
        "np.zeros(0)",
        "np.complex64(1)",
        "np.array([1j])",
        "np.array(['1'])",
        "np.timedelta64(3, 's')",
        "np.array([np.datetime64('2020')])",
        "np.float32",
    ],
)
def test_other_values_of_numpy_are_not(code: str) -> None:
    value = numpy_value(code)

    assert not is_number(value)
    assert as_number(value) is None


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.0),
        torch.tensor([True]),
        torch.tensor([[3]]),
        torch.tensor(2.0, dtype=torch.bfloat16),
        torch.ones(1, requires_grad=True) * 2,
        torch.nn.Parameter(torch.ones(())),
    ],
    ids=repr,
)
def test_a_tensor_with_one_element_stays_a_tensor_without_its_graph(tensor: torch.Tensor) -> None:
    number = as_number(tensor)

    assert is_number(tensor)
    assert type(number) is torch.Tensor
    assert not number.requires_grad
    assert (number.shape, number.dtype) == (tensor.shape, tensor.dtype)
    assert as_float(tensor) == tensor.item()


@pytest.mark.parametrize(
    "tensor", [torch.zeros(0), torch.zeros(2), torch.tensor(1j)], ids=lambda value: repr(value)
)
def test_a_tensor_with_more_or_complex_elements_is_not_a_number(tensor: torch.Tensor) -> None:
    assert not is_number(tensor)
    assert as_number(tensor) is None
    assert is_readable_alone(tensor)
