from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tools.run_snippets import program_of, run

MARKDOWN = textwrap.dedent("""\
    # Title

    ```python
    number = 1
    ```

    ```bash
    rm -rf nothing
    ```

    <!-- not run: needs a GPU -->

    ```python
    number = 2
    ```

    ```python
    assert number == 1
    ```
""")


def test_python_blocks_keep_their_lines_and_others_are_blank() -> None:
    program = program_of(MARKDOWN)

    assert program.split("\n")[3] == "number = 1"
    assert "rm -rf" not in program
    assert "number = 2" not in program
    assert program.split("\n")[17] == "assert number == 1"


def test_a_longer_fence_may_contain_a_shorter_one() -> None:
    assert program_of("````markdown\n```python\n1 / 0\n```\n````\n").strip() == ""


def test_blocks_of_a_file_are_one_program(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(MARKDOWN)

    assert run(page, timeout_s=60)


def test_a_failing_block_shows_its_line_in_the_markdown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nprint('so far so good')\n1 / 0\n```\n")

    assert not run(page, timeout_s=60)
    assert f'File "{page}", line 5' in capfd.readouterr().err


def test_warnings_are_errors(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nimport warnings\nwarnings.warn('old', stacklevel=1)\n```\n")

    assert not run(page, timeout_s=60)
