"""Words and tokens."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from demotools.mission_table import MissionTable
from demotools.vocabulary import (
    WORDS,
    extended_words,
    mission_tokens,
    mission_words,
)


def test_the_word_list_is_the_one_of_the_format_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text("utf-8")
    listed = re.search(r"<!-- words -->\n```\n(.*?)```", page, re.DOTALL)
    assert listed is not None
    assert tuple(listed[1].split()) == WORDS
    assert len(set(WORDS)) == len(WORDS)


def test_tokens_of_a_mission_are_word_ids_padded_with_zero() -> None:
    tokens = mission_tokens(["Go to the RED ball, then open", "go"])
    assert tokens.dtype == np.uint8
    expected = [[WORDS.index(w) + 1 for w in ("go", "to", "the", "red", "ball", "then", "open")]]
    assert tokens.tolist() == [*expected, [1, 0, 0, 0, 0, 0, 0]]


def test_more_than_255_words_need_two_bytes() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = extended_words([" ".join(a + b + "q" for a in letters[:12] for b in letters)])
    assert len(words) > 255
    tokens = mission_tokens([words[-1]], words)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [[len(words)]]


def test_a_given_length_cuts_and_pads() -> None:
    assert mission_tokens(["go to the red ball", "go"], length=2).tolist() == [[1, 2], [1, 0]]


@given(st.lists(st.text(), max_size=5))
def test_every_text_has_tokens_under_its_own_extended_vocabulary(missions: list[str]) -> None:
    words = extended_words(missions)
    assert words[: len(WORDS)] == WORDS
    tokens = mission_tokens(missions, words)
    for text, row in zip(missions, tokens, strict=True):
        assert [words[token - 1] for token in row if token] == mission_words(text)


@given(st.text())
def test_words_are_runs_of_a_to_z_in_the_lower_cased_text(mission: str) -> None:
    assert mission_words(mission) == re.findall("[a-z]+", mission.lower())


@given(st.lists(st.lists(st.text(), max_size=4), max_size=4))
def test_a_mission_table_gives_the_tokens_of_its_missions(parts: list[list[str]]) -> None:
    distinct = list(dict.fromkeys(text for part in parts for text in part))
    with TemporaryDirectory() as folder:
        table = MissionTable(Path(folder) / "missions.json")
        with table:
            rows = [table.rows(part).tolist() for part in parts]
        texts = [text for block in table.blocks(2) for text in block]
        tokens = table.tokens()
    assert rows == [[distinct.index(text) for text in part] for part in parts]
    assert texts == distinct
    words = extended_words(distinct)
    assert table.words == words
    np.testing.assert_array_equal(tokens, mission_tokens(distinct, words))
