"""The bot's subgoals as codes: what it is doing at a step, in words that a network can learn.

The bot keeps a stack of subgoals and acts on the top one. Its kind and its object give one of about
a hundred short texts; a code is the position of the text in the list. If the bot walks to a spot on
the floor (to drop something there, or to step aside), the text does not say which spot.
"""

from __future__ import annotations

from typing import Any

from minigrid.core.world_object import WorldObj
from minigrid.envs.babyai.core.verifier import ObjDesc
from minigrid.utils.baby_ai_bot import (
    CloseSubgoal,
    DropSubgoal,
    ExploreSubgoal,
    GoNextToSubgoal,
    OpenSubgoal,
    PickupSubgoal,
    Subgoal,
)

from demotools.babyai.cells import COLOURS

_THINGS = ("ball", "box", "key")
_ACTS = {CloseSubgoal: "close", DropSubgoal: "drop", OpenSubgoal: "open", PickupSubgoal: "pick up"}


_ANYTHING = [
    f"the {colour} {kind}".replace("  ", " ")
    for kind in ("object", "door", *_THINGS)
    for colour in ("", *COLOURS)
]
_DOORS = [f"the {colour} door" for colour in COLOURS]
_CARRIED = [f"the {colour} {kind}" for kind in _THINGS for colour in COLOURS]
_OBJECTS = {
    **dict.fromkeys(("go to", "go next to"), _ANYTHING),
    **dict.fromkeys(("open", "close"), _DOORS),
    **dict.fromkeys(("pick up", "drop"), _CARRIED),
}
SUBGOALS = (
    *("unknown", "done", "explore", "go to a place"),
    *(f"{act} {what}" for act, objects in _OBJECTS.items() for what in objects),
)
"""What each code stands for."""
UNKNOWN = SUBGOALS.index("unknown")
"""The code of steps whose subgoal is not known, as in a store that was merged with one without."""
_CODES = {text: code for code, text in enumerate(SUBGOALS)}


def subgoal_code(subgoal: Subgoal | None, level: Any) -> int:
    """The code of the bot's topmost subgoal, 0 <= code < len(SUBGOALS).

    subgoal   None where the plan is carried out
    level     the unwrapped environment, in the state that the bot has just looked at
    """
    return _CODES.get(_subgoal_text(subgoal, level), UNKNOWN)


def _subgoal_text(subgoal: Any, level: Any) -> str:
    if subgoal is None:
        return "done"
    if isinstance(subgoal, ExploreSubgoal) or subgoal.is_exploratory():
        return "explore"
    if isinstance(subgoal, GoNextToSubgoal):
        about = subgoal.datum
        if not isinstance(about, ObjDesc | WorldObj):
            return "go to a place"
        words = "the", about.color, about.type or "object"
        go = "go next to" if subgoal.reason == "PutNext" else "go to"
        return " ".join([go, *filter(None, words)])
    about = level.carrying if isinstance(subgoal, DropSubgoal) else level.grid.get(*level.front_pos)
    act = next(act for kind, act in _ACTS.items() if isinstance(subgoal, kind))
    return f"{act} the {about.color} {about.type}" if about else "unknown"
