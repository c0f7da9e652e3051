"""A training file before it is settings: parsed TOML, with single keys overridden."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from demotools.errors import SettingsError

_DEEPEST = 16


def toml_tree(text: str, path: Path | str) -> dict[str, Any]:
    """What a TOML file says; SettingsError where it is not TOML, or no file of settings could be.

    path   of the file, for the message
    """
    try:
        tree = tomllib.loads(text)
    # besides its own, tomllib lets through what int() says of thousands of digits
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"the recipe is not valid TOML: {error}", path=path, fix="correct the file"
        ) from error
    check_tree(tree, path)
    return tree


def check_tree(tree: dict[str, Any], path: Path | str) -> None:
    """SettingsError where a value can be no setting: nested too deep, NaN, text that is no text."""
    level: list[tuple[str, Any]] = list(tree.items())
    for _ in range(_DEEPEST):
        deeper: list[tuple[str, Any]] = []
        for key, value in level:
            if isinstance(value, dict):
                deeper += [(f"{key}.{name}", item) for name, item in value.items()]
            elif isinstance(value, list):
                deeper += [(f"{key}.{number}", item) for number, item in enumerate(value)]
            elif wrong := _wrong(key) or _wrong(value):
                raise SettingsError(
                    f"the settings are wrong at `{_shown(key)}`: {wrong}",
                    path=path,
                    fix="correct that key in the file, or with --set",
                )
        level = deeper
    if level:
        raise SettingsError(
            f"the settings are nested more than {_DEEPEST} deep at `{_shown(level[0][0])}`",
            path=path,
            fix="look at a shipped recipe: `trainer recipes`",
        )


def setting_leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """`a.b` and `a.0.b` of a tree to the values there."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {path: tree}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= setting_leaves(value, f"{path}.{key}" if path else str(key))
    return leaves


def override(tree: dict[str, Any], text: str) -> None:
    """Set in `tree` what `a.b=value` says; SettingsError where it is not of that form."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise SettingsError(
            "an override is not of the form KEY=VALUE",
            path=f"--set {_shown(text)}",
            fix="write it as in `--set optimizer.lr=1e-3` or `--set stages.0.losses=[]`",
        )
    set_key(tree, key, _toml_value(key, value) if value else None)


def set_key(tree: dict[str, Any], key: str, value: object) -> None:
    """Set what `a.b` or `stages.0.x` or `stages.0` names; None removes it."""
    *parents, last = key.split(".")
    place: Any = tree
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else _item(place, part, key)
    if isinstance(place, list):
        _item(place, last, key)  # that there is one
        place[int(last) : int(last) + 1] = [] if value is None else [value]
        return
    if not isinstance(place, dict):
        raise SettingsError(
            f"there is nothing to set inside `{_shown('.'.join(parents))}`",
            path=f"--set {_shown(key)}",
            fix="look at the keys with --dry-run",
        )
    if value is not None:
        place[last] = value
    else:
        place.pop(last, None)


def _item(place: Any, part: str, key: str) -> Any:
    count = len(place) if isinstance(place, list) else 0
    if re.fullmatch(r"[0-9]{1,9}", part) and int(part) < count:
        return place[int(part)]
    raise SettingsError(
        f"`{_shown(part)}` is not an item of this list of {count}",
        path=f"--set {_shown(key)}",
        fix="count from 0, as in `--set stages.0.max_demo_steps=1000`",
    )


def _toml_value(key: str, text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string, as a shell would have it
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"the value is no setting: {error}", path=f"--set {_shown(key)}", fix="correct it"
        ) from error


def _wrong(value: object) -> str:
    """What is wrong with a single value, if anything is."""
    if isinstance(value, float) and math.isnan(value):
        return "it is not a number"
    if isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
        return "the text has a NUL or bytes that are not UTF-8"
    return ""


def _is_unicode(text: str) -> bool:
    return text == text.encode("utf-8", "replace").decode("utf-8")


def _shown(text: str) -> str:
    """A key for a message: short, and printable everywhere."""
    short = text if len(text) <= 80 else f"{text[:80]}..."
    return short.encode("utf-8", "backslashreplace").decode("utf-8")
