from __future__ import annotations

import textwrap

import pytest

from tools import check_docs
from tools.check_docs import (
    ARCHITECTURE,
    documented,
    exported,
    group_kinds,
    is_documented,
    missing_in_architecture,
    names_of_core,
    section,
    starts_threads,
    store_keys,
    thread_names,
    undocumented,
    wrong_files,
)
from tools.packages import ROOT

PAGE = ARCHITECTURE.read_text(encoding="utf-8")


def test_the_reference_shows_every_public_name_and_what_callback_packages_import() -> None:
    assert list(undocumented()) == []


def test_a_name_missing_from_the_reference_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "docs" / "explanation"  # it has pages, but shows no names
    monkeypatch.setattr(check_docs, "REFERENCE", folder)

    problems = list(undocumented())

    assert any("dream_trainer.world.World is public" in problem for problem in problems)
    assert any("imports dream_trainer.callbacks.Callback;" in problem for problem in problems)


def test_only_names_after_three_colons_are_documented() -> None:
    page = "# Title\n\n::: a.b.shown\n    options:\n\na.b.mentioned\n"

    assert documented([page]) == {"a.b.shown"}


def test_a_documented_package_documents_only_its_exports() -> None:
    exports = {"a.b": {"exported"}}

    assert is_documented("a.b.exported", {"a.b"}, exports)
    assert not is_documented("a.b.other", {"a.b"}, exports)
    assert not is_documented("a.c.exported", {"a.b"}, exports)


def test_imports_from_core_are_found_in_functions_and_for_type_checkers() -> None:
    source = textwrap.dedent("""
        import dream_trainer.world
        from torch import nn
        if TYPE_CHECKING:
            from dream_trainer.trainer import BaseTrainer
        def function():
            from dream_trainer.callbacks import Callback, Every as E
    """)

    assert set(names_of_core(source)) == {
        "dream_trainer.world",
        "dream_trainer.trainer.BaseTrainer",
        "dream_trainer.callbacks.Callback",
        "dream_trainer.callbacks.Every",
    }


def test_exports_are_read_from_dunder_all() -> None:
    assert exported("from a import b, c\n__all__ = ['b']\n") == {"b"}
    assert exported("import a\n") == set()


def test_the_architecture_page_names_every_thread_key_and_group() -> None:
    assert list(missing_in_architecture(PAGE)) == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("| `loader-watch`", "trainer/loader_watch.py starts a thread"),
        ("| `failure-monitor`", "has the thread 'failure-monitor'"),
        ("| `terminated/<rank>` |", "has the key 'terminated/'"),
        ("| `processes/<machine>` |", "has the key 'processes/'"),
        ("| `checkpoint-background` |", "has the process group 'checkpoint-background'"),
    ],
)
def test_a_row_missing_from_the_architecture_page_is_reported(row: str, problem: str) -> None:
    assert PAGE.count(f"\n{row}") == 1
    page = "\n".join(line for line in PAGE.splitlines() if not line.startswith(row))

    assert any(problem in each for each in missing_in_architecture(page))


def test_files_and_functions_of_the_explanations_exist() -> None:
    pages = [ARCHITECTURE, *(ARCHITECTURE.parent / "decisions").glob("*.md")]

    assert len(pages) > 5
    assert [p for page in pages for p in wrong_files(page.read_text(encoding="utf-8"))] == []


def test_a_file_or_a_function_that_does_not_exist_is_reported() -> None:
    page = (
        "In `trainer/gone.py` and `trainer/loop.py`.\n"
        "| 1 | a step | `trainer/loop.py` | `fit`, `gone` |\n"
        "| 2 | prose after a file | `checkpoint/dcp.py` | not a `name` of it |\n"
    )

    assert list(wrong_files(page)) == [
        "there is no trainer/gone.py",
        "trainer/loop.py doesn't define gone",
    ]


def test_threads_are_found_with_their_names() -> None:
    source = textwrap.dedent("""
        threading.Thread(target=work, name="worker", daemon=True).start()
        call_in_daemon_thread("reader", read, path)
        threading.Thread(target=work, name=f"{name} writer")
    """)

    assert starts_threads(source)
    assert thread_names(source) == {"worker", "reader"}
    assert not starts_threads("threading.Event()\n")


def test_keys_are_found_up_to_the_first_variable_part() -> None:
    source = textwrap.dedent("""
        self.store.set(f"place/{rank}", place)
        self.client.count("seen")
        self.store.check([f"goodbye/{span}/{rank}"])
        self._key = f"processes/{machine_id()}"
        counters.get("step")
    """)

    assert store_keys(source) == {"place/", "seen", "goodbye/", "processes/"}


def test_groups_are_found_by_their_kind() -> None:
    source = textwrap.dedent("""
        def group(self, kind: str = "control"): ...
        world.group("requests")
        coordination(self.trainer.world, "checkpoint-background")
    """)

    assert group_kinds(source) == {"control", "requests", "checkpoint-background"}


def test_a_section_ends_at_the_next_heading() -> None:
    assert section("## A\n\none\n\n## B\n\ntwo\n", "A").strip() == "one"
