"""The fast way through a demo file: one episode in three regular expressions.

CPython's pickler has spelled an episode in the same order of opcodes ever since: mission, blosc
frame, list of directions, list of actions, tuple. What does not match, however slightly, is left
to the machine of `opcodes`; so nothing here decides what is allowed. Three patterns and not one,
because the lengths of mission and frame stand in the file.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any, NamedTuple

from demotools.inert import MAX_BYTES, MAX_TEXT, Blob, Run
from demotools.layouts import ACTION_COUNT, PicklePart
from demotools.opcodes import Machine

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
_FETCH = re.compile(rb"h.|j.{4}", re.DOTALL)


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
            mission = self._machine.fetched_text(value)
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
        fetched, plain, mixed, single = lists.group(4, 5, 6, 7)
        if fetched is not None:
            action: bytes = fetched[1::2].translate(self._actions)
            if _UNKNOWN in action:
                self._learn_actions()
                action = fetched[1::2].translate(self._actions)
            return None if _UNKNOWN in action else action
        if plain is not None:
            plain_action: bytes = plain[1::2]
            return plain_action
        if mixed is None and single[0] == ord("K"):
            return bytes(single[1:])
        opcodes = [single] if mixed is None else _FETCH.findall(mixed)
        values = [self._memo_action(int.from_bytes(opcode[1:], "little")) for opcode in opcodes]
        return None if _UNKNOWN in values else bytes(values)

    def _learn_actions(self) -> None:
        self._actions = bytes(self._memo_action(slot) for slot in range(256))

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
