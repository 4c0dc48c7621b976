"""Check a release tag and build it: `tools/release.py dream-trainer-core-v0.1.0`.

Refuses the tag `<distribution>-vX.Y.Z` unless version, changelog and bounds agree. Builds the wheel
and the source distribution into `dist/`. Publishes nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.check_bounds import problems_of
from tools.packages import DISTRIBUTIONS, ROOT, Distribution


@dataclass(frozen=True)
class Release:
    """Distribution and version of a tag."""

    distribution: Distribution
    version: str


def parsed_tag(tag: str) -> Release:
    """The distribution and the version in `<distribution>-vX.Y.Z`.

    Raises:
        ValueError: If the tag has another form, or names no distribution of this repository.
    """
    match = re.fullmatch(r"(?:refs/tags/)?(.+)-v(\d+\.\d+\.\d+)", tag)
    if match is None:
        raise ValueError(f"{tag!r} is no release tag; <distribution>-vX.Y.Z is required")
    for distribution in DISTRIBUTIONS:
        if distribution.name == match[1]:
            return Release(distribution, match[2])
    known = ", ".join(each.name for each in DISTRIBUTIONS)
    raise ValueError(f"{tag!r} names {match[1]!r}, which isn't here; take one of {known}")


def open_fragments(folder: Path) -> list[str]:
    """News fragments that are in no section of the changelog."""
    fragments = (folder / "changelog.d").glob("*.*.md")
    return sorted(path.name for path in fragments)


def problems_of_release(release: Release) -> Iterator[str]:
    """Reasons why this can't be released."""
    distribution, version = release.distribution, release.version
    if distribution.version() != version:
        yield (
            f"pyproject.toml says {distribution.version()}, the tag says {version}; "
            "set the version in a commit and tag that"
        )
    changelog = (distribution.folder / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## {re.escape(version)} ", changelog, re.MULTILINE):
        yield f"CHANGELOG.md has no section {version}; run towncrier as CONTRIBUTING.md says"
    if fragments := open_fragments(distribution.folder):
        yield f"changelog.d still has {', '.join(fragments)}; towncrier takes them up"
    yield from problems_of(distribution, DISTRIBUTIONS[0])


def build(release: Release, folder: Path) -> None:
    """Build the source distribution, and the wheel from it, into `folder`.

    Raises:
        subprocess.CalledProcessError: If building fails.
    """
    source = str(release.distribution.folder)
    command = [sys.executable, "-m", "build", "--outdir", str(folder), source]
    subprocess.run(command, check=True)


def main() -> int:
    """Check and build; 1 if the tag can't be released."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tag", help="<distribution>-vX.Y.Z")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist/")
    parser.add_argument("--check-only", action="store_true", help="build nothing")
    arguments = parser.parse_args()
    try:
        release = parsed_tag(arguments.tag)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    problems = list(problems_of_release(release))
    for problem in problems:
        print(f"{release.distribution.name}: {problem}", file=sys.stderr)
    if problems:
        return 1
    if not arguments.check_only:
        build(release, arguments.out)
    print(f"{release.distribution.name} {release.version} is ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
