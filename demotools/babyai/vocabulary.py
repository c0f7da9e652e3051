"""Missions: their words, the token ids of these, and the table of distinct missions.

Stores of different levels, splits and sources agree on the ids, so a network trained on one reads
the other. Words of other files that are not in the list are appended and recorded in the store.

The distinct missions of a store in the making, in order of appearance, in bounded memory.

A million missions of BossLevel are nearly all distinct; kept as Python strings, with their words,
they would take more than half a gigabyte. Here the texts and their token ids go to files as they
appear, and only their hashes stay.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from string import ascii_letters, digits
from typing import Self
from unicodedata import category

import numpy as np
from numpy.typing import DTypeLike, NDArray

from demotools.errors import StoreError

VERSION = "babyai-1"

# Id 0 is padding, so word k of this list has the id k + 1. The order is part of the file format:
# words are only ever appended. Source: the grammar of `minigrid.envs.babyai.core.verifier`.
WORDS: tuple[str, ...] = (
    *("go", "to", "open", "pick", "up", "put", "next", "then", "after", "you", "and"),
    *("the", "a", "red", "green", "blue", "purple", "yellow", "grey"),
    *("object", "door", "key", "ball", "box"),
    *("on", "your", "left", "right", "in", "front", "of", "behind"),
)

MAX_WORDS = (1 << 16) - 1
"""The most words that ids of two bytes tell apart."""

_WORD_BYTES = f"{ascii_letters}{digits}_".encode()
_ASCII_WORDS = bytes(code if code in _WORD_BYTES else ord(" ") for code in range(256)).lower()


def mission_words(mission: str) -> list[str]:
    """The words of a mission: runs of letters, marks, digits and `_` in its lower-cased text.

    Letters and digits of any script; all else separates. Marks, as the vowel signs of Hindi, are
    what `\\w` of a regular expression leaves out.

    >>> mission_words("Pick up the grey box, then go to door 2")
    ['pick', 'up', 'the', 'grey', 'box', 'then', 'go', 'to', 'door', '2']
    """
    if mission.isascii():  # three times as fast as a regular expression
        return mission.encode("ascii").translate(_ASCII_WORDS).decode("ascii").split()
    return "".join(letter if _in_word(letter) else " " for letter in mission.lower()).split()


def _in_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_" or category(letter).startswith("M")


def alike(tokens: NDArray[np.uint8] | NDArray[np.uint16]) -> tuple[int, int] | None:
    """Two rows that are the same; None where all differ. No two missions may share tokens.

    tokens   [M, L]

    >>> alike(np.array([[1, 2], [3, 0], [1, 2]], np.uint8))
    (0, 2)
    """
    mixed = np.zeros(len(tokens), np.uint64)
    for column in tokens.T:
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + column
    _values, first, counts = np.unique(mixed, return_inverse=True, return_counts=True)
    seen: dict[bytes, int] = {}
    for row in np.flatnonzero(counts[first] > 1).tolist():
        earlier = seen.setdefault(tokens[row].tobytes(), row)
        if earlier != row:
            return earlier, row
    return None


def mission_tokens(
    missions: Sequence[str], words: Sequence[str] = WORDS
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Token ids of missions, 0 where a mission is shorter than the longest.

    words    every word of every mission must be among them (KeyError otherwise)
    returns  uint8 (uint16 from 256 words on) [M, L]

    >>> mission_tokens(["go to a box", "open the door"])
    array([[ 1,  2, 13, 24],
           [ 3, 12, 21,  0]], dtype=uint8)
    """
    ids = word_ids(words)
    rows = [[ids[word] for word in mission_words(mission)] for mission in missions]
    width = max(map(len, rows), default=0)
    tokens = np.zeros((len(rows), width), dtype=token_dtype(len(words)))
    for row, numbers in zip(tokens, rows, strict=True):
        row[: len(numbers)] = numbers
    return tokens


def word_ids(words: Sequence[str] = WORDS) -> dict[str, int]:
    """The token id of each word; 0 is no word's."""
    return {word: number for number, word in enumerate(words, start=1)}


def token_dtype(words: int) -> DTypeLike:
    """What holds the ids of so many words."""
    return np.uint8 if words < 256 else np.uint16


def vocabulary_hash(words: Sequence[str]) -> str:
    """The sha256 of the words in order, one a line: equal hashes mean equal token ids."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


_HASH_BYTES = 16
_MAX_RECENT = 1 << 16
_MAX_TOKENS = 1 << 29


class MissionTable:
    """Numbers missions; `file` receives their texts, JSON lists of them, and `.ids` their ids.

    StoreError  a mission has no words, two have the same, or there are too many words
    """

    def __init__(self, file: Path) -> None:
        self._id_of_word = word_ids()
        self._length = array("H")
        self._file = file
        self._ids_file = file.with_suffix(".ids")
        self._row_of_hash: dict[bytes, int] = {}
        self._recent: dict[str, int] = {}
        self._texts = file.open("w", encoding="utf-8")
        self._ids = self._ids_file.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._texts.close()
        self._ids.close()

    def __len__(self) -> int:
        return len(self._row_of_hash)

    @property
    def words(self) -> tuple[str, ...]:
        """All words so far, in the order of their ids."""
        return tuple(self._id_of_word)

    def rows(self, missions: Sequence[str]) -> NDArray[np.int32]:
        """The row of each mission, a new one where it appears for the first time."""
        new: list[str] = []
        found = [self._recent.get(text, -1) for text in missions]
        for place, row in enumerate(found):
            if row < 0:
                found[place] = self._row(missions[place], new)
        if new:
            self._append(new)
        return np.array(found, dtype=np.int32)

    def _row(self, text: str, new: list[str]) -> int:
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES).digest()
        row = self._row_of_hash.get(digest)
        if row is None:
            row = self._row_of_hash[digest] = len(self)
            new.append(text)
        if len(self._recent) < _MAX_RECENT:
            self._recent[text] = row
        return row

    def _append(self, missions: list[str]) -> None:
        ids = array("H")
        for text in missions:
            words = mission_words(text)
            if not 0 < len(words) <= MAX_WORDS:
                what = f"more than {MAX_WORDS:,}" if words else "no"
                raise self._refused(f"the mission {text[:200]!r} has {what} words")
            self._length.append(len(words))
            try:
                ids.extend([self._id_of_word[word] for word in words])
            except KeyError:
                self._learn(words)
                ids.extend([self._id_of_word[word] for word in words])
        self._ids.write(ids.tobytes())
        self._texts.write(json.dumps(missions) + "\n")

    def _learn(self, words: list[str]) -> None:
        for word in words:
            self._id_of_word.setdefault(word, len(self._id_of_word) + 1)
        if len(self._id_of_word) > MAX_WORDS:
            raise self._refused(f"the missions have more than {MAX_WORDS:,} different words")

    def _refused(self, what: str) -> StoreError:
        return StoreError(
            what,
            path=self._file.parent,
            fix="correct the missions at the source: words consist of letters, marks and digits, "
            "and missions must differ by more than case and punctuation",
        )

    def blocks(self, size: int) -> Iterator[list[str]]:
        """The missions in order, `size` at a time."""
        with self._file.open(encoding="utf-8") as stream:
            missions = chain.from_iterable(map(json.loads, stream))
            while block := list(islice(missions, size)):
                yield block

    def tokens(self) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """The token ids of all missions, 0 behind the shorter ones: [M, L]."""
        length = np.frombuffer(self._length, np.uint16).astype(np.int64)
        width = int(length.max(initial=0))
        if len(self) * width > _MAX_TOKENS:
            raise self._refused(f"{len(self):,} missions of up to {width:,} words are too many")
        tokens = np.zeros((len(self), width), token_dtype(len(self._id_of_word)))
        with self._ids_file.open("rb") as stream:
            for start in range(0, len(self), _MAX_RECENT):
                block = slice(start, start + _MAX_RECENT)
                ids = np.fromfile(stream, np.uint16, int(length[block].sum()))
                tokens[block][np.arange(width) < length[block, None]] = ids
        if pair := alike(tokens):
            first, second = (self._text(row) for row in pair)
            raise self._refused(f"the missions {first!r} and {second!r} have the same words")
        return tokens

    def _text(self, row: int) -> str:
        return next(islice(chain.from_iterable(self.blocks(_MAX_RECENT)), row, None))
