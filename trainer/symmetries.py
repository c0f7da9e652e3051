"""Which augmentation a store allows: what its level declares, and what its words can say.

Refused before training starts, so that no network learns from episodes that are wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from demotools.errors import ManifestError, SettingsError
from demotools.grid import (
    ACTIONS,
    AGENT_COLUMN,
    AGENT_ROW,
    BALL,
    BOX,
    COLOURS,
    KEY,
    TYPES,
    UNPACKING_TABLE,
)
from demotools.manifest import MANIFESTS_VARIABLE, Manifest, Symmetry, read_manifest
from demotools.store import Store
from demotools.vocabulary import WORDS
from trainer.augment import SIDES
from trainer.config import Settings

_EXCHANGED: Mapping[Symmetry, Sequence[str]] = {
    "recolor": COLOURS,
    "mirror": SIDES,
    "retype": TYPES,
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
        store, symmetries = stores[stage.off_policy.store], stage.off_policy.augment
        key = f"stages.{number}.off_policy.augment"
        _check_views(store, key)
        manifest = _declaring_manifest(store, symmetries, key)
        _check_words(store, symmetries, manifest, key)
        if "retype" in symmetries:
            _check_toggles(store, symmetries, key)
        for symmetry in symmetries:
            if symmetry in manifest.widened_by:
                lines[
                    f"augment: {symmetry} makes episodes of the task of {manifest.level} that the "
                    "level itself never has (docs/augmentation.md)"
                ] = None
    return list(lines)


def _declaring_manifest(store: Store, symmetries: Sequence[Symmetry], key: str) -> Manifest:
    """The manifest of the store's level, which declares these symmetries."""
    level = store.attributes.level
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
        f"`pytest tests/test_augment.py -k {level} -m 'slow or not slow'` proves it "
        "(docs/augmentation.md)",
    )


def _check_views(store: Store, key: str) -> None:
    if not store.packed:
        raise SettingsError(
            "augmentation exchanges packed cells, and this store holds images "
            f"({' x '.join(map(str, store.view.shape[1:]))}), whose colours it cannot tell",
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
            f"unchanged_words names {_listed(clash)}, which augmentation exchanges",
            path=manifest.level,
            fix="name only words that name no colour, no side and no type of thing",
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
            f"{_named(symmetries)} cannot be used: missions of this store hold "
            f"{_listed(unknown)}, and whether that names a colour, a side or a type of thing is "
            "not known",
            path=store.path,
            fix=f"{_without(key, symmetries, symmetries)}; or, if none of them does, list all of "
            f"them in the manifest of {manifest.level}, as in unchanged_words = "
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
                f"retype cannot be used: episode {episode} toggles a key, a ball or a box, of "
                "which only the box opens",
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
