from __future__ import annotations

from tools.packages import DISTRIBUTIONS, ROOT, requirement_name, third_party_requirements


def test_the_list_of_distributions_matches_the_folders() -> None:
    folders = {path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml")}

    assert {each.name for each in DISTRIBUTIONS} == folders
    assert all(each.pyproject()["project"]["name"] == each.name for each in DISTRIBUTIONS)


def test_names_are_parsed_from_requirements() -> None:
    assert requirement_name("safetensors[torch]>=0.4.5") == "safetensors"
    assert requirement_name("typing_extensions >= 4") == "typing_extensions"


def test_third_party_requirements_exclude_torch_and_our_packages() -> None:
    names = {requirement_name(each) for each in third_party_requirements()}

    assert {"rich", "wandb", "fsspec"} <= names
    assert not names & {"torch", *(each.name for each in DISTRIBUTIONS)}
