"""The card of a store: a header that a YAML reader understands, and a text that is true."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from click.testing import CliRunner

from demotools.cli import main
from demotools.errors import printable_text
from demotools.exchange.archive import archive_store
from demotools.exchange.publish import stores_card
from demotools.store.reading import Store
from tests.conftest import build_store, make_episodes
from tests.store.test_store import edit_attributes


def header(text: str) -> dict[str, Any]:
    """The card's metadata as a YAML reader gives it."""
    yaml = pytest.importorskip("yaml", reason="PyYAML, of the extra hf, is not installed")
    start, found, _rest = text.split("---\n", 2)
    assert start == ""
    read: dict[str, Any] = yaml.safe_load(found)
    return read


def test_the_header_holds_what_the_hub_reads(make_store: Callable[..., Store]) -> None:
    store = make_store(lengths=[3, 2, 4])
    edit_attributes(store.path, lambda a: a.update(licence="BSD-3-Clause (BabyAI)"))
    found = header(stores_card([store.path]))
    assert found["license"] == "bsd-3-clause"
    assert found["size_categories"] == ["n<1K"]
    assert found["language"] == ["en"]
    assert "reinforcement-learning" in found["task_categories"]
    assert "babyai" in found["tags"]


def test_a_licence_that_the_hub_does_not_know_is_other_with_its_text(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=[3])
    strange = 'ask: "the authors" # please'
    edit_attributes(store.path, lambda a: a.update(licence=strange))
    found = header(stores_card([store.path]))
    assert (found["license"], found["license_name"]) == ("other", strange)


@pytest.mark.parametrize(
    "licence",
    [
        *("MIT-0", "MIT or anything", "MITRE", "CC-BY-4.0-NC", "BSD-3-Clause-Attribution"),
        *("Apache-2.0 WITH LLVM-exception", "MIT (a) and (b)", "mit", "", "(MIT)"),
    ],
)
def test_a_licence_that_only_begins_like_a_known_one_is_other(
    licence: str, make_store: Callable[..., Store]
) -> None:
    store = make_store(lengths=[3])
    edit_attributes(store.path, lambda a: a.update(licence=licence))
    assert header(stores_card([store.path]))["license"] == "other"


@pytest.mark.parametrize(
    "strange", ["\x1b[2J", "\x85", "\x7f", "a\n---\nb: 1", "\u2028", "\ufffe", '"']
)
def test_strange_characters_in_a_text_break_no_card(
    strange: str, make_store: Callable[..., Store]
) -> None:
    store = make_store(lengths=[3])
    texts = dict.fromkeys(("level", "licence", "citation", "created_by"), strange)
    edit_attributes(store.path, lambda a: a.update(texts, source={strange: strange}))
    text = stores_card([store.path])
    shown = printable_text(strange)
    assert f"BabyAI {shown} demonstrations" in header(text)["pretty_name"]
    assert header(text)["license_name"] == shown
    assert text.endswith(f"## Licence and citation\n\n{shown}\n\n{shown}\n")
    assert all(line.isprintable() for line in text.split("\n"))


def test_licence_citation_source_and_arrays_stand_in_the_text(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=[3, 2, 4])
    edit_attributes(store.path, lambda a: a.update(citation="Somebody, 2018"))
    text = stores_card([store.path])
    assert text.endswith("## Licence and citation\n\nnone\n\nSomebody, 2018\n")
    assert "- kind: test" in text
    assert "| cells | uint8 | 9 x 7 x 7 | egocentric view, one byte a cell |" in text
    assert "3 episodes of 3.00 steps on average, 4 at most, 9 steps in all" in text
    assert f"`{store.attributes.fingerprint}`" in text


def test_several_stores_have_one_card_with_a_row_for_each(tmp_path: Path) -> None:
    stores = [
        build_store(tmp_path / f"{name}.zarr", make_episodes(lengths))
        for name, lengths in (("One", [3, 2]), ("Other", [4]))
    ]
    text = stores_card([store.path for store in stores])
    assert header(text)["pretty_name"] == "BabyAI demonstrations"
    assert "1 BabyAI level: 3 episodes, 9 steps in all" in text
    assert "| Other.zarr.zip | GoToLocal | train | 1 | 4.00 | 4 | 1 |" in text
    assert "| cells | uint8 | egocentric view, one byte a cell |" in text
    assert text.count("- kind: test\n") == 2
    assert text.endswith("## Licence and citation\n\nnone\n\nnone\n")


def test_the_code_on_the_card_runs_on_the_archive(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    store = make_store(lengths=[3, 2, 4])
    archive_store(store.path, quiet=True)
    monkeypatch.chdir(store.path.parent)
    code = re.search(r"```python\n(.*?)```", stores_card([store.path]), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    names["group"].store.close()
    printed = capsys.readouterr().out
    assert printed == f"{store.mission_text[0]} {store.action.span(0, 3)}\n"
    assert names["zarr"] is zarr


def test_the_command_prints_the_card_or_writes_it_and_does_not_replace_a_file_unasked(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    store = make_store(lengths=[3])
    printed = CliRunner().invoke(main, ["card", str(store.path)])
    assert printed.output == stores_card([store.path])
    file = tmp_path / "README.md"
    file.write_text("mine")
    refused = CliRunner().invoke(main, ["card", str(store.path), "-o", str(file)])
    assert (refused.exit_code, file.read_text()) == (1, "mine")
    written = CliRunner().invoke(main, ["card", str(store.path), "-o", str(file), "--overwrite"])
    assert written.exit_code == 0
    assert file.read_text() == stores_card([store.path])
