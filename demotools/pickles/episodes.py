"""An episode in a legacy pickle: its layouts, checked field by field, and a fast match of one.

Three layouts have been written since June 2018 (babyai's `make_agent_demos.py` and its history):

    (mission, blosc frame, directions, actions)       since 2018-08-28
    ([(observation, action, reward, done), ...], seed offset)       before
    [(observation, action, reward, done), ...]                      before that

Other programs have added fields after the first four, such as a seed, or named the fields in a
dictionary; arrays may replace lists; if there is one observation more than actions, it is the one
after the last action.

CPython's pickler has always written an episode in the same order of opcodes: mission, blosc frame,
list of directions, list of actions, tuple. `EpisodeMatcher` matches one at a time by three regular
expressions: not with one, because the file contains the lengths of mission and frame. Whatever does
not match, however slightly, is left to `machine`, which alone decides what is allowed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from demotools.babyai.cells import ACTIONS
from demotools.pickles.machine import MAX_BYTES, MAX_TEXT, Array, Blob, Machine, Run

DIRECTION_COUNT = 4
ACTION_COUNT = len(ACTIONS)

PART_STEPS = 1 << 16
PART_BYTES = 1 << 25
"""A part ends when its episodes have this many steps, or their images this many bytes."""
PART_EPISODES = 1 << 15

FramePlace = tuple[int, int, int]
"""Where a blosc frame starts in the file, its size, and the bytes that it announces to hold."""


class PickledEpisode(NamedTuple):
    """One episode, its images still packed: a blosc frame, or one array a step or for all.

    direction   one a step, or one more
    seed        -1 where it is unknown
    left_out    what else the pickle says of it
    """

    mission: str
    images: Blob | Sequence[Array]
    direction: bytes
    action: bytes
    seed: int = -1
    left_out: tuple[str, ...] = ()


@dataclass(slots=True)
class PicklePart:
    """Consecutive episodes of one file, their images still packed.

    number       number in the file of each episode
    mission      its text
    direction    its directions, one byte a step, or one more
    action       its actions, one byte a step
    start, size  where its blosc frame lies in the file, in bytes; start -1: see `loose`
    holds        bytes that the frame announces to hold
    loose        images that do not lie in the file as a frame, by place in this part
    seed         the known seeds, by place in this part
    left_out     what the pickle says of its episodes besides, with their number
    skipped      (number, reason) of the episodes that are not well formed
    most_steps   steps with which the part is full
    """

    number: list[int] = field(default_factory=list)
    mission: list[str] = field(default_factory=list)
    direction: list[bytes] = field(default_factory=list)
    action: list[bytes] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    holds: list[int] = field(default_factory=list)
    loose: dict[int, bytes | Sequence[Array]] = field(default_factory=dict)
    seed: dict[int, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    steps: int = 0
    image_bytes: int = 0
    most_steps: int = PART_STEPS

    @property
    def full(self) -> bool:
        """Whether the part should end here."""
        return (
            self.steps >= self.most_steps
            or self.image_bytes >= PART_BYTES
            or len(self.number) + len(self.skipped) >= PART_EPISODES
        )

    def add(
        self, number: int, mission: str, frame: FramePlace, direction: bytes, action: bytes
    ) -> None:
        """Append an episode."""
        self.number.append(number)
        self.mission.append(mission)
        self.direction.append(direction)
        self.action.append(action)
        start, size, holds = frame
        self.start.append(start)
        self.size.append(size)
        self.holds.append(holds)
        self.image_bytes += holds
        self.steps += len(action)

    def add_episode(self, number: int, episode: PickledEpisode) -> None:
        """Append an episode with its images."""
        mission, images, direction, action, seed, left_out = episode
        if seed >= 0:
            self.seed[len(self.number)] = seed
        self.left_out.update(left_out)
        if isinstance(images, Blob):
            if images.offset < 0:
                self.loose[len(self.number)] = images.data
            place = (images.offset, images.size, images.holds)
        else:
            self.loose[len(self.number)] = images
            place = (-1, 0, sum(len(array.data) for array in images))
        self.add(number, mission, place, direction, action)


_FIELD_OF_KEY = {
    **dict.fromkeys(("mission", "missions", "instruction", "instructions"), "mission"),
    **dict.fromkeys(("image", "images"), "images"),
    **dict.fromkeys(("direction", "directions"), "directions"),
    **dict.fromkeys(("action", "actions"), "actions"),
    **dict.fromkeys(("seed", "seeds"), "seed"),
}
_STEP_FIELDS = (4, 5)  # (observation, action, reward, done), or terminated and truncated


def is_whole_episode(value: Any) -> bool:
    """Whether this is an episode by itself, and not a step or another part of one."""
    return (
        type(value) is tuple
        and len(value) >= 4
        and type(value[0]) is str
        and isinstance(value[1], Blob | Array)
    )


def pickled_episode(item: Any) -> PickledEpisode:
    """The episode that an item of the outermost list holds.

    ValueError  it is none; the text says why
    """
    if type(item) is dict:
        return _named_episode(item)
    if type(item) is tuple and len(item) >= 4 and not _is_step(item[0]):
        if type(item[0]) is dict:
            raise ValueError("it is a step, not an episode: its steps belong in one list")
        seed, rest = _extra_fields(item)
        mission, images, directions, actions = item[:4]
        return _episode(mission, images, directions, actions, seed, rest)
    if type(item) is tuple and len(item) == 2 and type(item[1]) is int and not _is_step(item[0]):
        episode = _stepwise_episode(item[0])
        return episode._replace(left_out=(*episode.left_out, "the seed offset"))
    if type(item) in (list, tuple):
        return _stepwise_episode(item)
    raise ValueError(f"it is {_kind(item)}, not (mission, images, directions, actions)")


def column_episodes(columns: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    """The episodes of a dictionary that has a list for each field, one dictionary each.

    ValueError  it is no such dictionary; the text says why
    """
    keys = ", ".join(repr(key)[:40] for key in list(columns)[:8])
    lists = {key: _values(value) for key, value in columns.items()}
    known = {_FIELD_OF_KEY.get(key) for key, value in lists.items() if value is not None}
    if not {"mission", "images", "actions"} <= known:
        raise ValueError(f"holds a dict with the keys {keys or '(none)'}, not a list")
    if any(value is None for key, value in lists.items() if key in _FIELD_OF_KEY):
        raise ValueError(f"holds a dict with the keys {keys}, not all of them lists")
    sizes = {
        key: len(value)
        for key, value in lists.items()
        if key in _FIELD_OF_KEY and value is not None
    }
    if len(set(sizes.values())) != 1:
        raise ValueError(f"holds a dict whose lists differ in length: {sizes}")
    (size,) = set(sizes.values())
    # what is no list of the episodes is left out, as it stands
    rows = {k: v if v is not None and len(v) == size else [None] * size for k, v in lists.items()}
    for number in range(size):
        yield {str(key): values[number] for key, values in rows.items()}


def _named_episode(fields: dict[Any, Any]) -> PickledEpisode:
    found: dict[str, Any] = {}
    left_out = []
    for key, value in fields.items():
        field_name = _FIELD_OF_KEY.get(key)
        if field_name is None or field_name in found:
            left_out.append(f"the field {str(key)[:40]!r}")
        else:
            found[field_name] = value
    missing = [name for name in ("mission", "images", "actions") if name not in found]
    if missing:
        raise ValueError(f"it is a dictionary without {' and '.join(missing)}")
    actions = _small_numbers(found["actions"], ACTION_COUNT, "actions")
    if "directions" not in found:
        found["directions"] = [0] * len(actions)
        left_out.append("no directions (0 is stored)")
    seed = found.get("seed")
    return _episode(
        found["mission"],
        found["images"],
        found["directions"],
        actions,
        seed if type(seed) is int else -1,
        tuple(left_out),
    )


def _extra_fields(item: tuple[Any, ...]) -> tuple[int, tuple[str, ...]]:
    """The seed among the fields behind the first four, and what the others are.

    A seed is the only whole number there.
    """
    numbers = [place for place, value in enumerate(item) if place >= 4 and type(value) is int]
    seed = numbers[0] if len(numbers) == 1 and item[numbers[0]] >= 0 else 0
    left_out = [
        f"field {place + 1} ({_kind(value)})"
        for place, value in enumerate(item)
        if place >= 4 and place != seed
    ]
    return item[seed] if seed else -1, tuple(left_out)


def _episode(
    mission: Any, images: Any, directions: Any, actions: Any, seed: int, left_out: tuple[str, ...]
) -> PickledEpisode:
    if isinstance(images, Array):
        images = [images]
    arrays = type(images) in (list, tuple) and all(isinstance(each, Array) for each in images)
    if not isinstance(images, Blob) and not arrays:
        raise ValueError(
            f"its images are {_kind(images)}, not the bytes of a blosc frame or arrays"
        )
    action = _small_numbers(actions, ACTION_COUNT, "actions")
    direction = _small_numbers(directions, DIRECTION_COUNT, "directions")
    return _checked(mission, images, direction, action)._replace(seed=seed, left_out=left_out)


def _is_step(value: Any) -> bool:
    return type(value) is tuple and len(value) in _STEP_FIELDS and type(value[0]) is dict


def _stepwise_episode(steps: Any) -> PickledEpisode:
    if type(steps) not in (list, tuple):
        raise ValueError(f"it is {_kind(steps)}, not a list of steps")
    if not all(type(step) is tuple and len(step) in _STEP_FIELDS for step in steps):
        raise ValueError("its steps are not (observation, action, reward, done)")
    left_out = ["rewards"]
    if len(steps) > 1 and steps[-1][1] is None:
        steps = steps[:-1]
        left_out.append("the last observation, which has no action")
    if not steps:
        raise ValueError("it has no steps")
    observations = [step[0] for step in steps]
    if not all(type(observation) is dict for observation in observations):
        raise ValueError("its observations are not dictionaries: there are no images to convert")
    images = [observation.get("image") for observation in observations]
    if not all(isinstance(image, Array) and len(image.shape) == 3 for image in images):
        raise ValueError("its observations hold no images to convert")
    missions = [observation.get("mission") for observation in observations]
    if any(mission != missions[0] for mission in missions):
        raise ValueError("its mission changes from step to step")
    # observations of the first weeks had no direction; 0 is what later image-only files say too
    directions = [observation.get("direction", 0) for observation in observations]
    episode = _checked(
        missions[0],
        images,
        _small_numbers(directions, DIRECTION_COUNT, "directions"),
        _small_numbers([step[1] for step in steps], ACTION_COUNT, "actions"),
    )
    return episode._replace(left_out=tuple(left_out))


def _checked(
    mission: Any, images: Blob | Sequence[Array], direction: bytes, action: bytes
) -> PickledEpisode:
    if type(mission) is not str:
        raise ValueError(f"its mission is {_kind(mission)}, not text")
    if not 0 < len(mission) <= MAX_TEXT or not mission.isprintable():
        raise ValueError("its mission is not one line of text")
    if not action:
        raise ValueError("it has no steps")
    if len(direction) not in (len(action), len(action) + 1):
        raise ValueError(f"{len(direction)} directions for {len(action)} actions")
    return PickledEpisode(mission, images, direction, action)


def _values(value: Any) -> Sequence[Any] | None:
    """What a list or a row of numbers holds; None where it is neither, or contradicts itself."""
    if isinstance(value, Run):
        return value.values
    if type(value) in (list, tuple, bytes):
        return value  # type: ignore[no-any-return]
    if isinstance(value, Array):
        try:
            array = value.values()
        except (ValueError, TypeError):
            return None
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim == 1:
            # whole numbers are what they are, in whatever type
            whole = array.dtype.kind == "f" and (array == np.floor(array)).all()
            return [int(each) if whole else each for each in array.tolist()]
    return None


def _small_numbers(values: Any, count: int, what: str) -> bytes:
    """The numbers 0 <= number < count as bytes; ValueError where they are anything else."""
    numbers = _values(values)
    if numbers is None:
        raise ValueError(f"its {what} are {_kind(values)}, not a list")
    for number in numbers:
        if type(number) is not int:
            raise ValueError(f"one of its {what} is {_kind(number)}, not a number")
        if not 0 <= number < count:
            raise ValueError(f"one of its {what} is {number}, outside 0 <= number < {count}")
    return bytes(numbers)


def _kind(value: Any) -> str:
    names = {"Blob": "bytes", "Run": "a list", "NoneType": "None", "Named": "a name"}
    if type(value) is list and value and len({type(each) for each in value}) == 1:
        return f"a list of {type(value[0]).__name__.lower()}"
    name = type(value).__name__
    article = "an" if name[0] in "AaIi" else "a"
    return names.get(name, f"{article} {name.lower()}")


# The longest list that the pickler writes in one go has 1,000 values, of up to 5 bytes each.
_TAIL_BYTES = 1 << 13
_HEAD_BYTES = 1 << 10
_MAX_KEPT = 1 << 15
_MAX_MISSIONS = 1 << 10
_FROM_MEMO = 3  # the groups of the mission's pattern from this one on hold a memo slot
_UNKNOWN = 255


class _Patterns(NamedTuple):
    mission: re.Pattern[bytes]
    frame: re.Pattern[bytes]
    lists: re.Pattern[bytes]


def _patterns(put: bytes) -> _Patterns:
    """For one way of filling memo slots."""
    directions = rb"(?:\(((?:K[\x00-\x03])++)e|K([\x00-\x03])a)"
    actions = (
        rb"(?:\((?:((?:h.)++)|((?:K[\x00-\x06])++)|((?:h.|j.{4})++))e|(h.|j.{4}|K[\x00-\x06])a)"
    )
    return _Patterns(
        mission=re.compile(rb"\((?:X(.{4})|\x8c(.)|h(.)|j(.{4}))", re.DOTALL),
        frame=re.compile(rb"(" + put + rb")?(?:B(.{4})|C(.)|\x8e(.{8}))", re.DOTALL),
        lists=re.compile(
            rb"(" + put + rb")\]" + put + directions + rb"\]" + put + actions + rb"t" + put,
            re.DOTALL,
        ),
    )


_EXPLICIT = _patterns(rb"(?:q.|r.{4})")
_IMPLICIT = _patterns(rb"\x94")
_ACTION = re.compile(rb"[hK].|j.{4}", re.DOTALL)


class EpisodeMatcher:
    """Takes episodes off a machine that stands between two of them."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._explicit = machine.protocol <= 3
        self._patterns = _EXPLICIT if self._explicit else _IMPLICIT
        self._actions = bytes([_UNKNOWN]) * 256
        self._kept_slot: list[int] = []
        self._kept: list[tuple[PicklePart, int, bool]] = []
        self._missions: dict[bytes, str] = {}
        machine.fallback = self.fetched

    def take(self, part: PicklePart, first: int) -> int:
        """Append episodes to the part until it is full or one does not match; how many.

        first   number in the file of the next episode
        """
        number = first
        while not part.full and self._take_one(part, number):
            number += 1
        return number - first

    def _take_one(self, part: PicklePart, number: int) -> bool:
        window, patterns = self._machine.window, self._patterns
        window.ahead(_HEAD_BYTES)
        text = patterns.mission.match(window.buffer, window.at)
        if text is None:
            return False
        at, group = text.end(), text.lastindex or 0
        value = int.from_bytes(text[group], "little")
        if group >= _FROM_MEMO:
            mission = self._kept_text(value)
        elif value <= MAX_TEXT:
            mission = self._mission(window.buffer[at : at + value])
            at += value
        else:
            return False
        frame = patterns.frame.match(window.buffer, at)
        # a mission out of the memo is not put there again
        if frame is None or not mission or (group >= _FROM_MEMO) != (frame[1] is None):
            return False
        size = int.from_bytes(frame[frame.lastindex or 0], "little")
        start = frame.end() - window.at
        if size > MAX_BYTES:
            return False
        window.ahead(start + size + _TAIL_BYTES)
        start += window.at
        lists = patterns.lists.match(window.buffer, start + size)
        if lists is None:
            return False
        direction, action = lists[3] or lists[2][1::2], self._actions_of(lists)
        if action is None or len(direction) != len(action):
            return False
        holds = int.from_bytes(window.buffer[start + 4 : start + 8], "little")
        if len(self._kept) < _MAX_KEPT:
            self._keep(part, frame[1], lists[1])
        self._machine.memo_size += 5 if group < _FROM_MEMO else 4
        part.add(number, mission, (window.base + start, size, holds), direction, action)
        window.at = lists.end()
        return True

    def _kept_text(self, slot: int) -> str | None:
        with suppress(KeyError):
            value = self._machine.kept(slot)
            return value if type(value) is str else None
        return None

    def _mission(self, text: bytes) -> str | None:
        """The mission of these bytes; None where it is no line of text."""
        mission = self._missions.get(text)
        if mission is None:
            mission = _line(text)
            if mission and len(self._missions) < _MAX_MISSIONS:
                self._missions[text] = mission
        return mission

    def _actions_of(self, lists: re.Match[bytes]) -> bytes | None:
        """The actions of the third list, one byte each; None where one is not in the memo."""
        fetched, plain, others = lists.group(4, 5, 6)
        if plain is not None:
            return bytes(plain[1::2])
        if fetched is not None:
            action: bytes = fetched[1::2].translate(self._actions)
            if _UNKNOWN in action:
                self._actions = bytes(map(self._memo_action, range(256)))
                action = fetched[1::2].translate(self._actions)
        else:
            opcodes = _ACTION.findall(others or lists[7])
            numbers = ((each[:1], int.from_bytes(each[1:], "little")) for each in opcodes)
            action = bytes(
                number if opcode == b"K" else self._memo_action(number)
                for opcode, number in numbers
            )
        return None if _UNKNOWN in action else action

    def _memo_action(self, slot: int) -> int:
        value = self._machine.memo.get(slot)
        return value if type(value) is int and 0 <= value < ACTION_COUNT else _UNKNOWN

    def _keep(self, part: PicklePart, mission_put: bytes | None, frame_put: bytes) -> None:
        """Remember which memo slots the next episode of the part fills."""
        put = mission_put or frame_put
        explicit = self._explicit
        slot = int.from_bytes(put[1:], "little") if explicit else self._machine.memo_size
        self._kept_slot.append(slot)
        self._kept.append((part, len(part.number), mission_put is not None))

    def fetched(self, slot: int) -> Any:
        """What an episode that went the fast way put into a memo slot; KeyError where none did."""
        place = bisect_right(self._kept_slot, slot) - 1
        if place < 0:
            raise KeyError(slot)
        part, row, with_mission = self._kept[place]
        images = Blob(b"", part.start[row], part.size[row], part.holds[row])
        lists = (Run(part.direction[row]), Run(part.action[row]))
        whole = (part.mission[row], images, *lists)
        values = [*whole[0 if with_mission else 1 :], whole]
        if slot - self._kept_slot[place] >= len(values):
            raise KeyError(slot)
        return values[slot - self._kept_slot[place]]


def _line(text: bytes) -> str | None:
    try:
        line = text.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return line if line.isprintable() else None
