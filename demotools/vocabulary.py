"""Missions to token ids: one fixed word list for all of BabyAI.

Stores of different levels, splits and sources agree on the ids, so a network trained on one reads
the other. Words of foreign files that are not in the list are appended and recorded in the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from string import ascii_letters, digits
from unicodedata import category

import numpy as np
from numpy.typing import DTypeLike, NDArray

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
    missions: Sequence[str], words: Sequence[str] = WORDS, length: int | None = None
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Token ids of missions, 0 where a mission is shorter than the longest.

    words    every word of every mission must be among them (KeyError otherwise)
    length   L; None means the longest mission; longer missions are cut
    returns  uint8 (uint16 from 256 words on) [M, L]

    >>> mission_tokens(["go to a box", "open the door"])
    array([[ 1,  2, 13, 24],
           [ 3, 12, 21,  0]], dtype=uint8)
    """
    ids = word_ids(words)
    rows = [[ids[word] for word in mission_words(mission)] for mission in missions]
    width = max(map(len, rows), default=0) if length is None else length
    tokens = np.zeros((len(rows), width), dtype=token_dtype(len(words)))
    for row, numbers in zip(tokens, rows, strict=True):
        row[: len(numbers)] = numbers[:width]
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
