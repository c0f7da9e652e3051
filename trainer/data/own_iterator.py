"""Batches from the user's own iterator, named in a recipe: checked, counted, resumed.

`iterator = "module:Name"` names a class or a function. It returns an iterator, or an iterable that
can be restarted, over batches as in `trainer.batch`, with arrays or tensors:

    cells            uint8 [T, B, H, W]          expert_action   whole numbers [T, B], 0..6, or -1
    direction        uint8 [T, B]                                for a step that does not count
    masks            0 or 1 [T, B]               mission         whole numbers [T, B], rows of
    mission_tokens   whole numbers [M, L], or    missions        M texts

where `mission_tokens` or `missions` may also be an attribute of the iterator. Anything else in a
batch is passed on to the losses. With `state` and `load_state` (or `state_dict` and
`load_state_dict`) a resumed run restores its position; without them, it repeats and skips the
batches that were already used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demotools.babyai.cells import ACTIONS, CELL_CODES
from demotools.babyai.vocabulary import mission_tokens
from demotools.errors import SettingsError
from demotools.output import progress_bar
from trainer.batch import Batch
from trainer.learning.losses import not_plain
from trainer.settings.models import Named
from trainer.settings.user_code import build, find, users_code

_STATES = (("state", "load_state"), ("state_dict", "load_state_dict"))
_LIMITS = {
    "cells": (0, CELL_CODES - 1, torch.uint8),
    "direction": (0, 3, torch.uint8),
    "masks": (0, 1, torch.uint8),
    "expert_action": (-1, len(ACTIONS) - 1, torch.int64),
}
_CELLS = (
    "pack images [..., 3] with demotools.babyai.cells.packed_cells, or give our iterator "
    'layout="native"'
)


class OwnIterator:
    """The user's iterator, with the methods of ExpertTrajectoryIterator that training needs.

    settings   its `type` and its own keys
    key        the setting that names it
    handed     what it may ask for by the name of a parameter: stores (open ones), rollouts (of
               this process), rollout_len, seed, rank, world, words

    SettingsError  there is no such code, or a batch is not what is stated above
    """

    def __init__(self, settings: Named, key: str, **handed: Any) -> None:
        self._name, self._key = settings.type, key
        self._shape = handed["rollout_len"], handed["rollouts"]
        self._words, self._quiet = handed["words"], handed.pop("quiet")
        maker: Callable[..., Any] = find(key, self._name, {})
        with self._users_code():
            asked = inspect.signature(maker).parameters
        wanted = {name: value for name, value in handed.items() if name in asked}
        options = {**wanted, **settings.options}
        self._build: Callable[[], Any] = lambda: build(key, self._name, options, {}, wanted=object)
        self._table: Any = None
        self._begin()
        self.batches = 0
        self.mission_tokens = torch.zeros(1, 1, dtype=torch.int64)
        """Of the latest batch: int64 [M, L]."""

    def _begin(self) -> None:
        self._given = self._build()
        with self._users_code():
            # what has only `__next__` is an iterator too
            self._batches: Iterator[Any] = (
                iter(self._given) if hasattr(self._given, "__iter__") else self._given
            )

    def _users_code(self) -> Any:
        return users_code(self._key, self._name)

    def __next__(self) -> Batch:
        """The next batch, on the CPU; where the iterator ends, it begins anew."""
        with self._users_code():
            given = next(self._batches, None)
            if given is None:
                again = iter(self._given) if hasattr(self._given, "__iter__") else self._batches
                if again is self._batches:
                    self._begin()
                else:
                    self._batches = again
                given = next(self._batches, None)
        if given is None:
            raise self._wrong("it yields no batch")
        self.batches += 1
        return self._checked(given)

    def _checked(self, given: Any) -> Batch:
        if not isinstance(given, Mapping):
            raise self._wrong(f"a batch is {type(given).__name__}, not a dict")
        batch = {name: given[name] for name in given if name not in ("mission_tokens", "missions")}
        for name, (low, high, dtype) in _LIMITS.items():
            batch[name] = self._array(batch, name, low, high).to(dtype)
        self.mission_tokens = self._tokens(given)
        rows = len(self.mission_tokens)
        batch["mission"] = self._array(batch, "mission", 0, rows - 1).to(torch.int64)
        more = batch.keys() - _LIMITS.keys() - {"mission"}
        return {
            name: self._tensor(name, value) if name in more else value
            for name, value in batch.items()
        }

    def _tensor(self, name: str, value: Any) -> Tensor:
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._wrong(f"`{name}` cannot become a tensor: {error}") from error

    def _array(self, batch: Mapping[str, Any], name: str, low: int, high: int) -> Tensor:
        if name not in batch:
            what = f"a batch has no `{name}`, only {', '.join(batch) or 'nothing'}"
            raise self._wrong(what, _CELLS if name == "cells" else "")
        values = self._tensor(name, batch[name]).cpu()
        if name == "masks" and values.ndim == 3 and values.shape[2] == 1:
            values = values[..., 0]
        if values.shape[:2] != self._shape or values.ndim != (4 if name == "cells" else 2):
            shape = [*self._shape, *(["H", "W"] if name == "cells" else [])]
            hint = _CELLS if name == "cells" and values.ndim == 5 else ""
            if values.shape[:2] == self._shape[::-1]:
                hint = "put time first: transpose the first two dimensions"
            raise self._wrong(
                f"`{name}` has shape {list(values.shape)}, not [{', '.join(map(str, shape))}]", hint
            )
        if not low <= (smallest := values.min().item()) <= (largest := values.max().item()) <= high:
            raise self._wrong(
                f"`{name}` has values from {smallest} to {largest}, not within {low} to {high}"
            )
        return values

    def _tokens(self, given: Mapping[str, Any]) -> Tensor:
        for name in ("mission_tokens", "missions"):
            found = given.get(name, getattr(self._given, name, None))
            if found is None:
                continue
            if found is self._table:
                return self.mission_tokens
            if name == "mission_tokens":
                tokens = torch.as_tensor(np.asarray(found).astype(np.int64))
            else:
                tokens = torch.from_numpy(self._tokenised(list(found)))
            if (
                tokens.ndim != 2
                or not len(tokens)
                or not 0 <= tokens.min() <= tokens.max() <= len(self._words)
            ):
                raise self._wrong(f"`{name}` are not rows of word ids, 0 to {len(self._words)}")
            # a table for all batches is looked at once
            self._table = None if name in given else found
            return tokens
        raise self._wrong(
            "a batch has neither `mission_tokens` nor `missions`",
            "list the missions in `missions`, and their places in it in `mission` [T, B]",
        )

    def _tokenised(self, missions: list[str]) -> Any:
        try:
            return mission_tokens(missions, self._words).astype(np.int64)
        except KeyError as error:
            raise self._wrong(
                f"a mission has the word `{error.args[0]}`, which is not in the vocabulary",
                f"""add it in the recipe: `model.words = ["{error.args[0]}"]`""",
            ) from error

    def state(self) -> dict[str, Any]:
        """Where it stands: plain values and tensors."""
        own = None
        if (save := self._method(0)) is not None:
            with self._users_code():
                own = save()
            for strange in not_plain(own, "state"):
                raise self._wrong(
                    "its state must contain only numbers, texts, tensors, lists and dicts: "
                    f"{strange}"
                )
        return {"batches": self.batches, "own": own}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        if (load := self._method(1)) is not None:
            with self._users_code():
                load(state["own"])
            self.batches = int(state["batches"])
            return
        missing = range(int(state["batches"]) - self.batches)
        for _ in progress_bar(
            None, "skip used batches", "batches", items=missing, quiet=self._quiet
        ):
            next(self)

    def _method(self, which: int) -> Callable[..., Any] | None:
        for pair in _STATES:
            if all(hasattr(self._given, name) for name in pair):
                method: Callable[..., Any] = getattr(self._given, pair[which])
                return method
        return None

    def _wrong(self, what: str, fix: str = "") -> SettingsError:
        return SettingsError(
            f"the iterator does not yield valid batches: {what}",
            path=f"{self._key} = {self._name!r}",
            fix=f"{fix or 'correct what it yields'}; docs/own_parts.md says what a batch contains",
        )
