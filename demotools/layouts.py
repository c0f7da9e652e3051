"""The layouts of an episode in a legacy pickle, checked field by field.

Three have been written since June 2018 (babyai's `make_agent_demos.py` and its history):

    (mission, blosc frame, directions, actions)       since 2018-08-28
    ([(observation, action, reward, done), ...], seed offset)       before
    [(observation, action, reward, done), ...]                      before that
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from demotools.grid import ACTIONS
from demotools.inert import MAX_TEXT, Array, Blob, Run

DIRECTION_COUNT = 4
ACTION_COUNT = len(ACTIONS)


PART_STEPS = 1 << 16
PART_BYTES = 1 << 25
"""A part ends when its episodes have this many steps, or their images this many bytes."""
PART_EPISODES = 1 << 15


FramePlace = tuple[int, int, int]
"""Where a blosc frame starts in the file, its size, and the bytes that it announces to hold."""


class PickledEpisode(NamedTuple):
    """One episode, its images still packed: a blosc frame, or one array a step."""

    mission: str
    images: Blob | list[Array]
    direction: bytes
    action: bytes


@dataclass(slots=True)
class PicklePart:
    """Consecutive episodes of one file, their images still packed.

    number       number in the file of each episode
    mission      its text
    direction    its directions, one byte a step
    action       its actions, one byte a step
    start, size  where its blosc frame lies in the file, in bytes; start -1: see `loose`
    holds        bytes that the frame announces to hold
    loose        images that do not lie in the file as a frame, by place in this part
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
    loose: dict[int, bytes | list[Array]] = field(default_factory=dict)
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
        mission, images, direction, action = episode
        if isinstance(images, Blob):
            if images.offset < 0:
                self.loose[len(self.number)] = images.data
            place = (images.offset, images.size, images.holds)
        else:
            self.loose[len(self.number)] = images
            place = (-1, 0, sum(len(array.data) for array in images))
        self.add(number, mission, place, direction, action)


def pickled_episode(item: Any) -> PickledEpisode:
    """The episode that an item of the outermost list holds.

    ValueError  it is none; the text says why
    """
    if type(item) is tuple and len(item) == 4:
        mission, images, directions, actions = item
        if not isinstance(images, Blob):
            raise ValueError(f"its images are {_kind(images)}, not the bytes of a blosc frame")
        action = _small_numbers(actions, ACTION_COUNT, "actions")
        direction = _small_numbers(directions, DIRECTION_COUNT, "directions")
        return _checked(mission, images, direction, action)
    if type(item) is tuple and len(item) == 2 and type(item[1]) is int:
        item = item[0]
    if type(item) is list:
        return _stepwise_episode(item)
    raise ValueError(f"it is {_kind(item)}, not (mission, images, directions, actions)")


def _stepwise_episode(steps: list[Any]) -> PickledEpisode:
    if not all(type(step) is tuple and len(step) == 4 for step in steps):
        raise ValueError("its steps are not (observation, action, reward, done)")
    if not steps:
        raise ValueError("it has no steps")
    observations = [step[0] for step in steps]
    if not all(type(observation) is dict for observation in observations):
        raise ValueError("its observations are not dictionaries: there are no images to convert")
    images = [observation.get("image") for observation in observations]
    if not all(isinstance(image, Array) and len(image.shape) == 3 for image in images):
        raise ValueError("its observations hold no images to convert")
    missions = {observation.get("mission") for observation in observations}
    if len(missions) != 1:
        raise ValueError("its mission changes from step to step")
    # observations of the first weeks had no direction; 0 is what later image-only files say too
    directions = [observation.get("direction", 0) for observation in observations]
    return _checked(
        missions.pop(),
        [image for image in images if isinstance(image, Array)],
        _small_numbers(directions, DIRECTION_COUNT, "directions"),
        _small_numbers([step[1] for step in steps], ACTION_COUNT, "actions"),
    )


def _checked(
    mission: Any, images: Blob | list[Array], direction: bytes, action: bytes
) -> PickledEpisode:
    if type(mission) is not str:
        raise ValueError(f"its mission is {_kind(mission)}, not text")
    if not 0 < len(mission) <= MAX_TEXT or not mission.isprintable():
        raise ValueError("its mission is not one line of text")
    if not action:
        raise ValueError("it has no steps")
    if len(direction) != len(action):
        raise ValueError(f"{len(direction)} directions for {len(action)} actions")
    return PickledEpisode(mission, images, direction, action)


def _small_numbers(values: Any, count: int, what: str) -> bytes:
    """The numbers 0 <= number < count as bytes; ValueError where they are anything else."""
    if isinstance(values, Run):
        numbers: Sequence[Any] = values.values
    elif type(values) is list:
        numbers = values
    else:
        raise ValueError(f"its {what} are {_kind(values)}, not a list")
    for number in numbers:
        if type(number) is not int:
            raise ValueError(f"one of its {what} is {_kind(number)}, not a number")
        if not 0 <= number < count:
            raise ValueError(f"one of its {what} is {number}, outside 0 <= number < {count}")
    return bytes(numbers)


def _kind(value: Any) -> str:
    names = {"Blob": "bytes", "Run": "a list", "NoneType": "None", "Named": "a name"}
    name = type(value).__name__
    return names.get(name, f"a {name.lower()}")
