"""Missions to token ids: one fixed word list for all of BabyAI.

Stores of different levels, splits and sources agree on the ids, so a network trained on one reads
the other. Words of foreign files that are not in the list are appended and recorded in the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from string import ascii_lowercase

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

_LETTERS_ALONE = bytes(code if chr(code) in ascii_lowercase else ord(" ") for code in range(256))


def mission_words(mission: str) -> list[str]:
    """The words of a mission: runs of a to z in its lower-cased text; all else separates.

    >>> mission_words("Pick up the grey box, then go to a door")
    ['pick', 'up', 'the', 'grey', 'box', 'then', 'go', 'to', 'a', 'door']
    """
    # three times as fast as a regular expression
    text = mission.lower().encode("utf-8", "surrogatepass").translate(_LETTERS_ALONE)
    return text.decode("ascii").split()


def extended_words(missions: Iterable[str], words: Sequence[str] = WORDS) -> tuple[str, ...]:
    """The word list followed by the words of `missions` that it lacks, in order of appearance.

    >>> extended_words(["go to the red lamp"])[len(WORDS):]
    ('lamp',)
    """
    known = dict.fromkeys(words)
    for mission in missions:
        known.update(dict.fromkeys(mission_words(mission)))
    return tuple(known)


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
