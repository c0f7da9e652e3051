"""Messages about invalid settings: which setting, what is wrong, and what may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from demotools.errors import MISSING, SettingsError, in_our_words

UNKNOWN = "there is no such key"
_PAGE = "docs/coming_from_allenact.md"
_SHOWN = 6

_OF_ALLENACT = {
    "num_train_processes": "on_policy.environments",
    "NUM_TRAIN_SAMPLERS": "on_policy.environments",
    "num_steps": "rollout_len",
    "num_mini_batch": "minibatches",
    "update_repeats": "repeats",
    "max_stage_steps": "max_env_steps",
    "save_interval": "run.save_every_env_steps",
    "loss_names": "losses",
    "named_losses": "losses",
    "loss_weights": "losses",
    "early_stopping_criterion": "early_stopping",
    "start": "from",
    "end": "to",
    "clip_param": "clip",
    "clip_decay": "clip_decay_steps",
    "value_loss_coef": "value_weight",
    "entropy_coef": "entropy_weight",
    "normalize_advantage": "normalise_advantages",
    "rnn_hidden": "model.memory",
}
_OF_OTHERS = {
    "learning_rate": "lr",
    "batch_size": "rollouts",
    "num_envs": "on_policy.environments",
    "n_envs": "on_policy.environments",
    "n_steps": "rollout_len",
    "class": "type",
    "name": "type",
}
_TYPES = {
    **dict.fromkeys(
        ("imitation", "bc", "behaviour_cloning", "behavior_cloning", "cross_entropy", "dagger"),
        "expert_cross_entropy",
    ),
    "babyairecurrentacmodel": "big",
    "lineardecay": "linear",
}


class Problem(NamedTuple):
    """One wrong setting.

    key   empty where it is of several together
    """

    key: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"`{self.key}`: {self.what}" if self.key else self.what


def pydantic_problems(
    error: ValidationError,
    tree: Any,
    beside: Callable[[Sequence[str]], list[str]],
    everywhere: Iterable[str],
) -> list[Problem]:
    """What pydantic found in a tree of settings, unknown keys first: one misspelt is missing too.

    beside       the keys of the section that a key stands in
    everywhere   the keys of all sections
    """
    unknown, wrong = [], dict[str, list[str]]()
    for problem in error.errors():
        parts = _parts_of_tree(problem["loc"], tree, missing=problem["type"] == "missing")
        if problem["type"] == "extra_forbidden":
            unknown.append(unknown_key(parts, beside(parts), everywhere))
        else:
            wrong.setdefault(".".join(parts), []).append(in_our_words(problem, "toml"))
    sections = {one.key.rpartition(".")[0] for one in unknown}
    inside = [*wrong, *(one.key for one in unknown)]
    return unknown + [
        Problem(
            key,
            ", or ".join(dict.fromkeys(whats)),
            "write `[[stages]]`, with two brackets"
            if key == "stages" and isinstance(tree.get(key), dict)
            else "correct that key"
            if key
            else "correct it",
        )
        for key, whats in wrong.items()
        if not (whats == [MISSING] and key.rpartition(".")[0] in sections)
        # without its wrong items a list may be too short
        and not any(other.startswith(f"{key}.") for other in inside)
    ]


def _parts_of_tree(location: Sequence[object], tree: Any, *, missing: bool) -> list[str]:
    """The key that pydantic names, without its names for the kinds of a union."""
    parts: list[str] = []
    for number, part in enumerate(location, start=1):
        inside = isinstance(tree, dict) and part in tree
        if inside or (isinstance(tree, list) and isinstance(part, int) and part < len(tree)):
            tree = tree[part]
        elif not (missing and number == len(location)):
            break
        parts.append(str(part))
    return parts


def unknown_key(
    parts: Sequence[str], beside: Sequence[str], everywhere: Iterable[str] = ()
) -> Problem:
    """That there is no such key, with the nearest, or the section that it belongs into."""
    *_, name = parts
    meant = {**_OF_ALLENACT, **_OF_OTHERS}.get(name, name)
    page = f" ({_PAGE} has AllenAct's other names)" if name in _OF_ALLENACT else ""
    elsewhere = [key for key in everywhere if key.rpartition(".")[2] == meant]
    if meant in beside or ("." in meant and name != meant):
        hint = f"; did you mean {meant}?{page}"
    elif elsewhere and not difflib.get_close_matches(name, beside, cutoff=0.85):
        hint = f"; did you mean {' or '.join(sorted(elsewhere, key=_depth)[:2])}?{page}"
    else:
        hint = nearest(name, beside, "the valid keys are")
    return Problem(".".join(parts), UNKNOWN, f"remove it{hint}")


def _depth(key: str) -> int:
    return key.count(".")


def unknown_type(name: str, known: Iterable[str]) -> str:
    """What may have been meant by a `type` that does not exist."""
    names = list(known)
    module, _, attribute = name.removesuffix(".py").rpartition(".")
    if module:
        return f"name your own as `package.module:Name`; did you mean `{module}:{attribute}`?"
    near = [one for one in names if one == _TYPES.get(name.lower(), name.lower())]
    near = near or difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
    return f"{f'{hint}; ' if names else ''}name your own as `package.module:Name`"


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a sentence: the nearest names, else all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; {otherwise} {', '.join(names)}" if names else ""


def refusal(
    problems: Sequence[Problem], path: Path | str, given: Mapping[str, str]
) -> SettingsError:
    """All that is wrong in one message.

    given   where keys come from, of those that are not from the file at `path`
    """
    first = problems[0]
    if len(problems) == 1 and first.what == UNKNOWN:
        what = f"unknown key `{first.key}`"
    elif len(problems) == 1:
        what = f"invalid settings{f' at `{first.key}`' if first.key else ''}: {first.what}"
    else:
        shown = [str(one) for one in problems[:_SHOWN]]
        more = len(problems) - len(shown)
        shown += [f"{more} more"] if more else []
        what = f"{len(problems)} settings are invalid: {'; '.join(shown)}"
    places = (place for one in problems for place in _places(one.key, path, given))
    where = list(dict.fromkeys(places))
    fixes = [one.fix for one in problems[:_SHOWN]]
    if len(set(fixes)) > 1:
        fixes = [f"`{one.key}`: {one.fix}" for one in problems[:_SHOWN]]
    return SettingsError(what, path=", ".join(where), fix="; ".join(dict.fromkeys(fixes)))


def _places(key: str, path: Path | str, given: Mapping[str, str]) -> Iterator[str]:
    """Where a key may come from: what was said last of it, else the file."""
    of_key = [
        place
        for name, place in given.items()
        if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.")
    ]
    if of_key:
        yield of_key[-1]
        return
    yield str(path)
    if not key:
        yield from given.values()
