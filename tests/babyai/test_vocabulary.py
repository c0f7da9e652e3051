"""Words and tokens."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from demotools.babyai.levels import level_names, read_manifest
from demotools.babyai.vocabulary import (
    MAX_WORDS,
    WORDS,
    MissionTable,
    alike,
    mission_tokens,
    mission_words,
)
from demotools.errors import StoreError
from demotools.recording.environment import make_environment


def extended_words(missions: list[str]) -> tuple[str, ...]:
    """The word list and the words of `missions` that it lacks, in order of appearance."""
    return tuple(dict.fromkeys([*WORDS, *(w for text in missions for w in mission_words(text))]))


MISSIONS = ("go to the lamp", "öffne die Tür 3", "가라", "put it", "go", "3", "जाओ")


def test_the_word_list_is_the_one_of_the_format_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text("utf-8")
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


@given(st.lists(st.text(), max_size=5))
def test_every_text_has_tokens_under_its_own_extended_vocabulary(missions: list[str]) -> None:
    words = extended_words(missions)
    assert words[: len(WORDS)] == WORDS
    tokens = mission_tokens(missions, words)
    for text, row in zip(missions, tokens, strict=True):
        assert [words[token - 1] for token in row if token] == mission_words(text)


def slow_words(mission: str) -> list[str]:
    """The same rule, letter by letter."""
    words: list[str] = []
    word = ""
    for letter in mission.lower() + " ":
        if re.fullmatch(r"\w", letter) or unicodedata.category(letter) in ("Mn", "Mc", "Me"):
            word += letter
        elif word:
            words, word = [*words, word], ""
    return words


@given(st.text())
def test_words_are_runs_of_letters_marks_and_digits_in_the_lower_cased_text(mission: str) -> None:
    assert mission_words(mission) == slow_words(mission)


@pytest.mark.parametrize(
    ("mission", "words"),
    [
        ("go there in 2 steps", ["go", "there", "in", "2", "steps"]),
        ("Go to the GRÜNE ball!", ["go", "to", "the", "grüne", "ball"]),
        ("빨간 공으로 가라", ["빨간", "공으로", "가라"]),
        ("लाल गेंद के पास जाओ", ["लाल", "गेंद", "के", "पास", "जाओ"]),
        ("go to door_3", ["go", "to", "door_3"]),
    ],
)
def test_words_of_any_script_are_kept_whole(mission: str, words: list[str]) -> None:
    assert mission_words(mission) == words


@pytest.mark.parametrize("level", level_names())
def test_the_words_of_every_level_keep_their_ids(level: str) -> None:
    environment_id = read_manifest(level).environment_id
    if environment_id is None:
        pytest.skip(f"{level} has no environment any more")
    environment = make_environment(level)
    for seed in range(5):
        mission = environment.reset(seed=seed)[0]["mission"]
        assert mission_words(mission) == re.findall("[a-z]+", mission.lower())
        assert set(mission_words(mission)) <= set(WORDS)


def table_of(missions: list[str], folder: Path) -> MissionTable:
    table = MissionTable(folder / "missions.json")
    with table:
        table.rows(missions)
    table.tokens()
    return table


@pytest.mark.parametrize(
    "pair",
    [
        ("go to the ball", "Go to the ball!"),
        ("go to the ball, then open a door", "go to the ball then open a door"),
        ("go 🟥", "go 🟦"),
    ],
)
def test_two_missions_with_the_same_words_are_refused_by_name(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    with pytest.raises(StoreError) as caught:
        table_of(["open a door", *pair], tmp_path)
    assert all(repr(mission) in caught.value.what for mission in pair)


@pytest.mark.parametrize("mission", ["!!!", "🟥"])
def test_a_mission_without_words_is_refused_by_name(tmp_path: Path, mission: str) -> None:
    with pytest.raises(StoreError, match="has no words"):
        table_of([mission], tmp_path)


def test_more_words_than_two_bytes_tell_apart_are_refused(tmp_path: Path) -> None:
    most = MAX_WORDS - len(WORDS)
    assert len(table_of([f"w{number}" for number in range(most)], tmp_path).words) == MAX_WORDS
    with pytest.raises(StoreError, match="more than 65,535 different words"):
        table_of([f"w{number}" for number in range(most + 1)], tmp_path)


def test_missions_whose_table_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="of up to 8,000 words are too many"):
        table_of(
            ["go " * 8000, *(f"{number // 300} {number % 300}" for number in range(70_000))],
            tmp_path,
        )


@given(hnp.arrays(np.uint16, (9, 3), elements=st.integers(0, 2)))
def test_rows_that_are_alike_are_found(tokens: NDArray[np.uint16]) -> None:
    pair = alike(tokens)
    assert (pair is None) == (len(np.unique(tokens, axis=0)) == len(tokens))
    if pair:
        assert pair[0] < pair[1]
        assert (tokens[pair[0]] == tokens[pair[1]]).all()


@given(st.lists(st.lists(st.sampled_from(MISSIONS), max_size=4), max_size=4))
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
