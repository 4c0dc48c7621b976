"""The manifest round-trips or is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from catalogs import manifest

from dream_callbacks.checkpoint import DamagedCheckpointError
from dream_callbacks.checkpoint.format.manifest import FileSum, Manifest, sealed, unsealed


def test_a_manifest_round_trips() -> None:
    assert Manifest.decode(manifest().encode()) == manifest()
    assert manifest().num_bytes == 40


def test_a_metric_may_be_nan() -> None:
    found = Manifest.decode(manifest(metrics={"val_loss": math.nan}).encode())

    assert math.isnan(found.metrics["val_loss"])


def test_a_manifest_is_plain_json() -> None:
    document = json.loads(manifest(metrics={"val_loss": math.nan}).encode(), parse_constant=refuse)

    assert document["step"] == 200


def refuse(name: str) -> None:
    raise AssertionError(f"{name} isn't JSON")


def test_a_newer_format_is_refused_with_a_hint() -> None:
    document = unsealed(manifest().encode())
    document["format"] = 2

    with pytest.raises(DamagedCheckpointError, match=r"format 2.*reads format 1; upgrade"):
        Manifest.decode(sealed(document))


def test_unknown_fields_are_ignored() -> None:
    document = unsealed(manifest().encode())
    document["later"] = {"a": 1}

    assert Manifest.decode(sealed(document)) == manifest()


ADDED = {"monitor", "mode", "keeps_best"}
"""Fields that earlier versions didn't write."""


def test_a_manifest_of_an_earlier_version_has_no_monitor() -> None:
    document = unsealed(manifest(monitor="accuracy", mode="max").encode())

    found = Manifest.decode(sealed({k: v for k, v in document.items() if k not in ADDED}))

    assert found.monitor == ""


@pytest.mark.parametrize("name", sorted(unsealed(manifest().encode()).keys() - ADDED))
def test_a_missing_field_is_named(name: str) -> None:
    document = unsealed(manifest().encode())
    del document[name]

    with pytest.raises(DamagedCheckpointError, match=name if name != "format" else "None"):
        Manifest.decode(sealed(document))


@pytest.mark.parametrize(
    "change",
    [{"seq": "x"}, {"epoch": None}, {"created_unix": [1]}, {"shape": {"tp": math.inf}}],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_refused(change: dict[str, Any]) -> None:
    document = unsealed(manifest().encode()) | change

    with pytest.raises(DamagedCheckpointError, match="has one of the wrong type"):
        Manifest.decode(sealed(document))


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "..", ""])
def test_a_file_outside_the_folder_is_refused(name: str) -> None:
    with pytest.raises(DamagedCheckpointError, match="nothing outside of it is read"):
        Manifest.decode(manifest(files={name: FileSum(1, 1)}).encode())


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\x80\x04}.", b'{"sha256":"', b"\0"])
def test_malformed_manifests_are_refused(data: bytes) -> None:
    with pytest.raises(DamagedCheckpointError):
        Manifest.decode(data)


def test_a_sealed_list_is_refused() -> None:
    with pytest.raises(DamagedCheckpointError):
        unsealed(sealed({"a": 1}).replace(b'"a":1', b'"a":2'))
