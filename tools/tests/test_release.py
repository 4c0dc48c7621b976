from __future__ import annotations

from pathlib import Path

import pytest

from tools.packages import BY_SHORT_NAME
from tools.release import Release, open_fragments, parsed_tag, problems_of_release


@pytest.mark.parametrize("prefix", ["", "refs/tags/"])
def test_a_tag_is_parsed_as_distribution_and_version(prefix: str) -> None:
    release = parsed_tag(f"{prefix}dream-callbacks-fsdp-v1.20.3")

    assert release == Release(BY_SHORT_NAME["fsdp"], "1.20.3")


@pytest.mark.parametrize("tag", ["v1.0.0", "dream-trainer-core-1.0.0", "dream-trainer-core-v1.0"])
def test_other_tags_are_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="no release tag"):
        parsed_tag(tag)


def test_an_unknown_distribution_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="take one of dream-trainer-core"):
        parsed_tag("dream-callbacks-nothing-v1.0.0")


def test_a_version_that_is_not_in_pyproject_and_changelog_is_refused() -> None:
    problems = list(problems_of_release(Release(BY_SHORT_NAME["core"], "99.0.0")))

    assert any("the tag says 99.0.0" in problem for problem in problems)
    assert any("CHANGELOG.md has no section 99.0.0" in problem for problem in problems)


def test_the_readme_of_the_folder_is_not_a_fragment(tmp_path: Path) -> None:
    folder = tmp_path / "changelog.d"
    folder.mkdir()
    for name in ("README.md", "7.fixed.md", "+speed.changed.md"):
        (folder / name).touch()

    assert open_fragments(tmp_path) == ["+speed.changed.md", "7.fixed.md"]
