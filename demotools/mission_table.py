"""The distinct missions of a store in the making, in order of appearance, in bounded memory.

A million missions of BossLevel are nearly all distinct; kept as Python strings, with their words,
they would take more than half a gigabyte. Here the texts go to a file as they appear, and only
their hashes stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from demotools.vocabulary import WORDS, extended_words, mission_tokens, mission_words

_HASH_BYTES = 16
_MAX_RECENT = 1 << 16


class MissionTable:
    """Numbers missions; `file` receives their texts, one JSON text a line."""

    def __init__(self, file: Path) -> None:
        self.words: tuple[str, ...] = WORDS
        self._known = set(WORDS)
        self._longest = 0
        self._file = file
        self._row_of_hash: dict[bytes, int] = {}
        self._recent: dict[str, int] = {}
        self._stream = file.open("w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()

    def __len__(self) -> int:
        return len(self._row_of_hash)

    def rows(self, missions: Sequence[str]) -> NDArray[np.int32]:
        """The row of each mission, a new one where it appears for the first time."""
        found = [self._recent.get(text, -1) for text in missions]
        for place, row in enumerate(found):
            if row < 0:
                found[place] = self._row(missions[place])
        return np.array(found, dtype=np.int32)

    def _row(self, text: str) -> int:
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES).digest()
        row = self._row_of_hash.get(digest)
        if row is None:
            row = self._row_of_hash[digest] = len(self)
            self._stream.write(json.dumps(text) + "\n")
            words = mission_words(text)
            self._longest = max(self._longest, len(words))
            if not self._known.issuperset(words):
                self.words = extended_words([text], self.words)
                self._known = set(self.words)
        if len(self._recent) < _MAX_RECENT:
            self._recent[text] = row
        return row

    def blocks(self, size: int) -> Iterator[list[str]]:
        """The missions in order, `size` at a time."""
        with self._file.open(encoding="utf-8") as stream:
            while block := [json.loads(line) for line in islice(stream, size)]:
                yield block

    def tokens(self) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """The token ids of all missions, 0 behind the shorter ones: [M, L]."""
        dtype = mission_tokens([], self.words).dtype
        tokens = np.zeros((len(self), self._longest), dtype=dtype)
        done = 0
        for block in self.blocks(_MAX_RECENT):
            tokens[done : done + len(block)] = mission_tokens(block, self.words, self._longest)
            done += len(block)
        return tokens
