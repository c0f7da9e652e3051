"""Four symmetries of the task, applied to native batches; and which of them a store allows.

`recolor` permutes the six colours of doors, keys, balls and boxes, `retype` permutes keys, balls
and boxes themselves, both in the cells and in the mission's words alike; `mirror` exchanges left
and right in the view, the direction, the actions and the mission's words; `rephrase` says "a, then
b" as "b after you a" and the other way round, the same task in other words. Each episode keeps its
draw from its first step to its last, across batches. A draw is a pure function of the seed, the
rollout and how many episodes the rollout has begun, so a resumed run draws the same, and so does
any number of processes.

Symmetries that a level does not declare, or that a store's words cannot express, are refused before
training starts, so that no network learns from wrong episodes (`check_augmentation`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import permutations, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demotools.babyai.cells import (
    ACTIONS,
    AGENT_COLUMN,
    AGENT_ROW,
    BALL,
    BOX,
    COLOURS,
    DOOR,
    KEY,
    TYPES,
    UNPACKING_TABLE,
    VIEW_SIZE,
)
from demotools.babyai.levels import MANIFESTS_VARIABLE, Manifest, Symmetry, read_manifest
from demotools.babyai.vocabulary import WORDS
from demotools.errors import ManifestError, SettingsError
from demotools.store.reading import Store
from trainer.batch import Batch
from trainer.data.order import GOLDEN, mixed_bits
from trainer.settings.models import Settings

PERMUTATIONS: NDArray[np.int64] = np.array(list(permutations(range(len(COLOURS)))))
"""int64 [720, 6]: the new colour of each colour; row 0 changes nothing."""
TYPE_PERMUTATIONS: NDArray[np.int64] = np.array(list(permutations(range(len(TYPES)))))
"""int64 [6, 3]: the new type of each of TYPES; row 0 changes nothing."""
EXCHANGES = len(TYPE_PERMUTATIONS) * len(PERMUTATIONS)
"""An exchange of things is type permutation * 720 + permutation."""
DRAWS = 2 * EXCHANGES
"""A draw is exchange * 2 + mirrored."""
MIRRORED_ACTION: NDArray[np.uint8] = np.array([1, 0, 2, 3, 4, 5, 6], dtype=np.uint8)
MIRRORED_DIRECTION: NDArray[np.uint8] = np.array([2, 1, 0, 3], dtype=np.uint8)
SIDES = ("left", "right")
_ORDERING = ("then", "after", "you")
_KINDS = np.array([KEY, BALL, BOX])
_COLUMN = np.dtype((np.void, VIEW_SIZE))


def exchanged_codes() -> NDArray[np.uint8]:
    """The code of a cell under every exchange: uint8 [4320, 256].

    Only doors, keys, balls and boxes change: walls are always grey, and empty and unseen cells
    have no colour.
    """
    kind, colour, state = UNPACKING_TABLE.astype(np.int64).T
    kinds = np.tile(kind, (len(TYPE_PERMUTATIONS), 1))
    for number, thing in enumerate(_KINDS):
        kinds[:, kind == thing] = _KINDS[TYPE_PERMUTATIONS[:, number]][:, None]
    colours = PERMUTATIONS[:, colour % len(COLOURS)]
    changed = kinds[:, None] * 18 + colours * 3 + state
    changes = np.isin(kind, (DOOR, *_KINDS))
    return np.where(changes, changed, np.arange(256)).astype(np.uint8).reshape(EXCHANGES, 256)


def exchanged_words(words: Sequence[str]) -> NDArray[np.uint16]:
    """The id of a word under every draw: uint16 [8640, N + 1].

    words   the N words of the vocabulary, with all colours or none, all types or none, both sides
            or none; id 0 is padding
    """
    ids = {word: number for number, word in enumerate(words, start=1)}
    identity = np.arange(len(words) + 1, dtype=np.uint16)
    table = np.tile(identity, (len(TYPE_PERMUTATIONS), len(PERMUTATIONS), 2, 1))
    if types := [ids[word] for word in TYPES if word in ids]:
        table[..., types] = np.array(types)[TYPE_PERMUTATIONS][:, None, None]
    if colours := [ids[word] for word in COLOURS if word in ids]:
        table[..., colours] = np.array(colours)[PERMUTATIONS][:, None]
    if sides := [ids[word] for word in SIDES if word in ids]:
        table[:, :, 1, sides] = sides[::-1]
    return table.reshape(DRAWS, len(words) + 1)


def exchanged_subgoals(texts: Sequence[str]) -> NDArray[np.uint8]:
    """The code of a subgoal under every exchange: uint8 [4320, 256].

    texts   what the codes stand for; where there is none for an exchanged text it becomes code 0,
            "unknown"
    """
    numbers = {text: number for number, text in enumerate(texts)}
    table = np.tile(np.arange(256, dtype=np.uint8), (len(TYPE_PERMUTATIONS), len(PERMUTATIONS), 1))
    for number, text in enumerate(texts):
        words = text.split()
        kind = next((TYPES.index(word) for word in words if word in TYPES), None)
        colour = next((COLOURS.index(word) for word in words if word in COLOURS), None)
        changed = np.empty((len(TYPES), len(COLOURS)), dtype=np.uint8)
        for new in product(range(len(TYPES)), range(len(COLOURS))):
            names = {} if kind is None else {TYPES[kind]: TYPES[new[0]]}
            names |= {} if colour is None else {COLOURS[colour]: COLOURS[new[1]]}
            changed[new] = numbers.get(" ".join(names.get(word, word) for word in words), 0)
        kinds, colours = TYPE_PERMUTATIONS[:, kind or 0], PERMUTATIONS[:, colour or 0]
        table[..., number] = changed[kinds[:, None], colours]
    return table.reshape(EXCHANGES, 256)


def episode_draws(
    seed: int, rollout: NDArray[np.int64], begun: NDArray[np.int64]
) -> NDArray[np.int64]:
    """What is drawn for episodes, 0 <= draw < 8640: int64, of the shape of both arrays.

    rollout   number of the rollout over all processes
    begun     how many episodes the rollout has begun, this one included
    """
    bits = _episode_bits(seed, rollout, begun)
    permutation = (bits >> np.uint64(1)) % np.uint64(len(PERMUTATIONS))
    types = (bits >> np.uint64(40)) % np.uint64(len(TYPE_PERMUTATIONS))
    exchange = types * np.uint64(len(PERMUTATIONS)) + permutation
    return (exchange * np.uint64(2) + (bits & np.uint64(1))).astype(np.int64)


def draws_rephrasing(
    seed: int, rollout: NDArray[np.int64], begun: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether episodes are to be rephrased: as `episode_draws`, which it does not depend on."""
    bits = mixed_bits(_episode_bits(seed, rollout, begun) + GOLDEN)
    return np.asarray(bits & np.uint64(1) == 1)


def _episode_bits(
    seed: int, rollout: NDArray[np.int64], begun: NDArray[np.int64]
) -> NDArray[np.uint64]:
    bits = np.array([seed], dtype=np.uint64) + GOLDEN
    for number in (rollout, begun):
        bits = mixed_bits(bits) + number.astype(np.uint64) + GOLDEN
    return np.asarray(mixed_bits(bits))


def rephrased_missions(
    text: NDArray[np.uint16], words: Sequence[str], chosen: NDArray[np.bool_]
) -> NDArray[np.uint16]:
    """Missions "a, then b" as "b after you a", and the other way round: uint16 [R, L + 1].

    text     [R, L] word ids, 0 after the last; one without just one such phrase stays as it is
    chosen   [R], which are to be rephrased
    """
    ids = {word: number for number, word in enumerate(words, start=1)}
    if not ids.keys() >= {*_ORDERING}:
        return np.pad(text, ((0, 0), (0, 1)))
    then, after, you = (ids[word] for word in _ORDERING)
    text = np.pad(text, ((0, 0), (0, 1)))
    is_then = text == then
    is_after = (text == after) & (np.roll(text, -1, axis=1) == you)
    phrases = is_then | is_after
    chosen = chosen & (phrases.sum(1) == 1)
    before = phrases.argmax(1)[:, None]  # words before the phrase, and after it
    old = np.where(is_then.any(1), 1, 2)[:, None]
    behind = (text != 0).sum(1)[:, None] - before - old
    new = 3 - old
    column = np.arange(text.shape[1])
    source = np.where(column < behind, before + old + column, column - behind - new)
    changed = np.take_along_axis(text, np.clip(source, 0, len(column) - 1), axis=1)
    changed[column >= behind + new + before] = 0
    for place, ids_there in ((0, np.where(old == 1, after, then)), (1, np.full_like(old, you))):
        rows = (new > place) & (column == behind + place)
        changed[rows] = np.broadcast_to(ids_there, rows.shape)[rows]
    return np.where(chosen[:, None], changed, text)


class Augmenter:
    """Applies symmetries to the native batches of one iterator.

    words      of the vocabulary, see `exchanged_words`
    subgoals   what the codes of `subgoal` stand for; without them exchanged batches have none
    """

    def __init__(
        self,
        symmetries: Sequence[Symmetry],
        words: Sequence[str],
        *,
        seed: int,
        subgoals: Sequence[str] = (),
    ) -> None:
        self._recolor, self._mirror = "recolor" in symmetries, "mirror" in symmetries
        self._retype, self._rephrase = "retype" in symmetries, "rephrase" in symmetries
        self._vocabulary = words
        self._texts = subgoals
        self._seed = seed

    @cached_property
    def _codes(self) -> Tensor:
        return torch.from_numpy(exchanged_codes().reshape(-1))

    @cached_property
    def _words(self) -> NDArray[np.uint16]:
        return exchanged_words(self._vocabulary)

    @cached_property
    def _subgoals(self) -> NDArray[np.uint8]:
        return exchanged_subgoals(self._texts)

    def __call__(
        self, batch: Batch, tokens: Tensor, begun: NDArray[np.int64], first_rollout: int = 0
    ) -> Batch:
        """The batch under each episode's draw, with the token ids of the missions in it.

        batch           on the CPU; it is left as it is
        tokens          int64 [M, L]
        begun           int64 [B], how many episodes each rollout has begun before the batch
        first_rollout   the number of the first rollout over all processes
        returns         as `batch_missions`
        """
        masks = batch["masks"].numpy()
        first, segment = _segments(masks)
        episode = (begun + np.cumsum(masks == 0, axis=0)).reshape(-1)[first]
        draw, rephrased = self._draws(first_rollout + first % masks.shape[1], episode)
        of_step = draw[segment]
        changed = dict(batch)
        if self._recolor or self._retype:
            changed["cells"] = self._exchanged(changed["cells"], of_step // 2)
            # the codes name colours and kinds, which are others now
            subgoal = changed.pop("subgoal", None)
            if subgoal is not None and self._texts:
                exchanged = self._subgoals[of_step // 2, subgoal.numpy()]
                changed["subgoal"] = torch.from_numpy(exchanged)
        if self._mirror:
            changed |= _mirrored(changed, of_step % 2 == 1)
        mission = batch["mission"].numpy().reshape(-1)[first]
        text = self._words[draw[:, None], tokens.numpy()[mission]]
        if self._rephrase:
            text = rephrased_missions(text, self._vocabulary, rephrased)
        # as bytes the rows are sorted several times faster than by torch.unique
        _, distinct, place = np.unique(
            text.astype(">u2").view(f"S{2 * text.shape[1]}")[:, 0],
            return_index=True,
            return_inverse=True,
        )
        changed["mission"] = torch.from_numpy(place[segment])
        changed["mission_tokens"] = torch.from_numpy(text[distinct].astype(np.int64))
        return changed

    def _exchanged(self, cells: Tensor, exchange: NDArray[np.int64]) -> Tensor:
        row = torch.from_numpy((exchange * 256).astype(np.int32))[..., None, None]
        return self._codes.index_select(0, (row + cells).view(-1)).view(cells.shape)

    def _draws(
        self, rollout: NDArray[np.int64], begun: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The draws of episodes as `episode_draws`, without what is switched off, and whether they
        are to be rephrased.
        """
        draw = episode_draws(self._seed, rollout, begun)
        types, permutation = np.divmod(draw // 2, len(PERMUTATIONS))
        exchange = types * len(PERMUTATIONS) * self._retype + permutation * self._recolor
        mirrored = draw % 2 * self._mirror
        return np.asarray(exchange * 2 + mirrored), draws_rephrasing(self._seed, rollout, begun)


def _segments(masks: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The R stretches of one episode in one rollout of a batch.

    returns   int64 [R], the first step of each, counted over [T, B] time first; and
              int64 [T, B], the number of each step's
    """
    begins = np.ascontiguousarray(masks.T) == 0  # [B, T]
    begins[:, 0] = True
    rollout, time = np.nonzero(begins)
    of_step = np.cumsum(begins).reshape(begins.shape) - 1
    return time * len(begins) + rollout, np.ascontiguousarray(of_step.T)


def _mirrored(batch: Batch, mirrored: NDArray[np.bool_]) -> Batch:
    """Cells, direction and action of a batch, exchanged where `mirrored` [T, B] says so."""
    cells = batch["cells"].numpy().copy()
    columns = cells.reshape(-1, VIEW_SIZE * VIEW_SIZE).view(_COLUMN)
    steps = np.flatnonzero(mirrored)
    columns[steps] = columns[steps, ::-1]
    changed = {"cells": torch.from_numpy(cells)}
    tables = {
        "expert_action": MIRRORED_ACTION,
        "taken": MIRRORED_ACTION,
        "direction": MIRRORED_DIRECTION,
    }
    for name in tables.keys() & batch.keys():
        values, table = batch[name].numpy(), tables[name]
        changed[name] = torch.from_numpy(np.where(mirrored, table[values], values))
    return changed


_EXCHANGED: Mapping[Symmetry, Sequence[str]] = {
    "recolor": COLOURS,
    "mirror": SIDES,
    "retype": TYPES,
    "rephrase": _ORDERING,
}
"""The words that a symmetry exchanges."""
_SHOWN_WORDS = 8
_TOGGLE = ACTIONS.index("toggle")
_STEPS_AT_ONCE = 1 << 24


def check_augmentation(settings: Settings, stores: Mapping[str, Store]) -> list[str]:
    """One line for each symmetry of the stages that widens its level, to be said to the user.

    stores   of all stages, by name

    SettingsError, ManifestError  a symmetry is refused, with the reason
    """
    lines: dict[str, None] = {}
    for number, stage in enumerate(settings.stages):
        if stage.off_policy is None or not stage.off_policy.augment:
            continue
        symmetries = stage.off_policy.augment
        key = f"stages.{number}.off_policy.augment"
        for store in dict.fromkeys(stores[one.name] for one in stage.off_policy.store):
            _check_views(store, key)
            manifests = [_declaring_manifest(store, one, symmetries, key) for one in store.levels]
            for manifest in manifests:
                _check_words(store, symmetries, manifest, key)
            if "retype" in symmetries:
                _check_toggles(store, symmetries, key)
            for manifest, symmetry in product(manifests, symmetries):
                if symmetry in manifest.widened_by:
                    lines[
                        f"augment: {symmetry} makes episodes of the task of {manifest.level} that "
                        "the level itself never has (docs/augmentation.md)"
                    ] = None
    return list(lines)


def _declaring_manifest(
    store: Store, level: str, symmetries: Sequence[Symmetry], key: str
) -> Manifest:
    """The manifest of a level of the store, which declares these symmetries."""
    try:
        manifest = read_manifest(level)
    except ManifestError as error:
        if error.path != level:
            raise  # a file that does not parse
        manifest = None
    missing = [one for one in symmetries if manifest is None or one not in manifest.symmetries]
    if manifest is not None and not missing:
        return manifest
    declared = manifest.symmetries if manifest is not None else ()
    lines = [f"symmetries = {json.dumps(sorted({*declared, *missing}))}"]
    if manifest is None:
        why = f"the level {level} of {store.name} has no manifest that declares it"
        lines = [f'level = "{level}"', 'environment_id = "…"', 'mission_pattern = "…"', *lines]
    else:
        why = f"the manifest of {level} does not declare it a symmetry of the level"
        if manifest.no_environment is not None:
            why += ", which has no environment to prove it in"
    written = ", ".join(f"`{line}`" for line in lines)
    raise SettingsError(
        f"{_named(missing)} cannot be used: {why}",
        path=key,
        fix=f"{_without(key, symmetries, missing)}. If the task is symmetric, a file {level}.toml "
        f"with the lines {written} in the folder ${MANIFESTS_VARIABLE} declares it, and "
        f"`pytest tests/data/test_augment.py -k {level} -m 'slow or not slow'` proves it "
        "(docs/augmentation.md)",
    )


def _check_views(store: Store, key: str) -> None:
    if not store.packed:
        raise SettingsError(
            "augmentation needs packed cells, but this store has images "
            f"({' x '.join(map(str, store.view.shape[1:]))})",
            path=store.path,
            fix=f"train without augmentation: --set {key}=[]",
        )


def _check_words(
    store: Store, symmetries: Sequence[Symmetry], manifest: Manifest, key: str
) -> None:
    """That every word of the store's missions is exchanged, or known to stay as it is."""
    all_exchanged = {word for words in _EXCHANGED.values() for word in words}
    clash = [word for word in manifest.unchanged_words if word in all_exchanged]
    if clash:
        raise ManifestError(
            f"unchanged_words lists {_listed(clash)}, which augmentation exchanges",
            path=manifest.level,
            fix="list only words that name no colour, side or type of object",
        )
    words = store.attributes.vocabulary
    for symmetry in symmetries:
        exchanged = _EXCHANGED[symmetry]
        lacking = [word for word in exchanged if word not in words]
        if lacking and len(lacking) < len(exchanged):
            known = [word for word in exchanged if word in words]
            raise SettingsError(
                f"{symmetry} cannot be used: the store's vocabulary has {_listed(known)} but not "
                f"{_listed(lacking)}, so missions could not be exchanged",
                path=store.path,
                fix=_without(key, symmetries, [symmetry]),
            )
    unknown = [word for word in words if word not in WORDS and word not in manifest.unchanged_words]
    if unknown:
        raise SettingsError(
            f"{_named(symmetries)} cannot be used: missions of this store contain "
            f"{_listed(unknown)}, which might name a colour, a side or a type of object",
            path=store.path,
            fix=f"{_without(key, symmetries, symmetries)}; or, if none of these words does, list "
            f"them all in the manifest of {manifest.level}, as in unchanged_words = "
            f"{json.dumps(unknown[:_SHOWN_WORDS])}",
        )


def toggles_thing(cells: NDArray[np.uint8], action: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which steps toggle a key, ball or box ahead: bool [N]. Only the box opens, and is gone.

    cells    [N, 7, 7], packed views
    action   [N]
    """
    ahead = UNPACKING_TABLE[cells[:, AGENT_COLUMN, AGENT_ROW - 1], 0]
    return np.asarray((action == _TOGGLE) & np.isin(ahead, (KEY, BALL, BOX)))


def _check_toggles(store: Store, symmetries: Sequence[Symmetry], key: str) -> None:
    for start in range(0, store.steps, _STEPS_AT_ONCE):
        stop = min(start + _STEPS_AT_ONCE, store.steps)
        toggled = start + np.flatnonzero(store.action.span(start, stop) == _TOGGLE)
        of_thing = toggles_thing(store.view.take(toggled), store.action.take(toggled))
        if of_thing.any():
            first = toggled[of_thing.argmax()]
            episode = int(np.searchsorted(store.episode_offset, first, side="right")) - 1
            raise SettingsError(
                f"retype cannot be used: episode {episode} toggles a key, a ball or a box, but "
                "only boxes open",
                path=store.path,
                fix=_without(key, symmetries, ["retype"]),
            )


def _without(key: str, symmetries: Iterable[Symmetry], refused: Iterable[Symmetry]) -> str:
    left = [symmetry for symmetry in symmetries if symmetry not in set(refused)]
    return f"train without it: --set '{key}={json.dumps(left)}'"


def _named(symmetries: Sequence[Symmetry]) -> str:
    return " and ".join(symmetries)


def _listed(words: Sequence[str]) -> str:
    shown = [f"`{word}`" for word in words[:_SHOWN_WORDS]]
    more = len(words) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
