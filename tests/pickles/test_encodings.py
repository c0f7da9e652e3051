from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from demotools.babyai.cells import Encoding
from demotools.pickles.encoding import Evidence

WALL = {Encoding.FIRST: 1, Encoding.SECOND: 2, Encoding.TODAY: 2}
EMPTY = {Encoding.FIRST: 0, Encoding.SECOND: 1, Encoding.TODAY: 1}
BALL = {Encoding.FIRST: 6, Encoding.SECOND: 7, Encoding.TODAY: 6}


def room(encoding: Encoding) -> NDArray[np.uint8]:
    """One view of an empty room with a wall on the left: uint8 [1, 7, 7, 3]."""
    view = np.zeros((1, 7, 7, 3), np.uint8)
    view[..., 0] = EMPTY[encoding]
    view[:, 0] = (WALL[encoding], 5, 0)
    return view


def test_walls_tell_the_first_encoding() -> None:
    evidence = Evidence()
    evidence.add(room(Encoding.FIRST), "go to the red ball", 0)
    assert evidence.encoding is Encoding.FIRST


def test_a_room_with_nothing_in_it_does_not_tell_the_later_two_apart() -> None:
    evidence = Evidence()
    evidence.add(room(Encoding.TODAY), "go to the red ball", 0)
    assert evidence.encoding is None
    assert "1 episodes read as 2018-08-28 (1 with impossible cells" in str(evidence)


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize(("action", "row"), [(2, 4), (3, 5), (4, 6)])
def test_the_object_of_the_last_action_tells_the_encoding(
    encoding: Encoding, action: int, row: int
) -> None:
    view = room(encoding)
    view[0, 3, row] = (BALL[encoding], 4, 0)
    evidence = Evidence()
    evidence.add(view, "pick up a yellow ball", action)
    assert evidence.encoding is encoding


@pytest.mark.parametrize(
    ("cell", "encoding"),
    [
        ((8, 4, 0), Encoding.SECOND),  # a box
        ((5, 4, 1), Encoding.SECOND),  # a locked door that was opened
        ((4, 4, 2), Encoding.TODAY),  # a locked door
    ],
)
def test_cells_that_only_one_encoding_has_tell_it(
    cell: tuple[int, int, int], encoding: Encoding
) -> None:
    view = room(encoding)
    view[0, 0, 2] = cell  # in the wall, where doors are
    evidence = Evidence()
    evidence.add(view, "do it", 0)
    assert evidence.encoding is encoding


def test_the_state_of_a_door_that_is_toggled_last_does_not_mislead() -> None:
    view = room(Encoding.TODAY)
    view[0, 3, 5] = (4, 2, 1)  # closed today, open before
    view[0, 0, 2] = (5, 2, 0)  # a key today, a locked door before
    evidence = Evidence()
    evidence.add(view, "open the blue door", 5)
    assert evidence.encoding is None


def test_values_outside_every_table_fit_no_encoding() -> None:
    view = room(Encoding.TODAY)
    view[0, 1, 1] = (200, 0, 0)
    evidence = Evidence()
    evidence.add(view, "go to the red ball", 0)
    assert evidence.impossible == dict.fromkeys(Encoding, 1)
    assert evidence.encoding is None


def test_a_few_last_actions_on_something_else_are_tolerated() -> None:
    evidence = Evidence()
    right, wrong = room(Encoding.TODAY), room(Encoding.TODAY)
    right[0, 3, 4] = wrong[0, 3, 4] = (BALL[Encoding.TODAY], 4, 0)
    for _ in range(19):
        evidence.add(right, "go to the yellow ball", 2)
    evidence.add(wrong, "go to the grey key", 2)
    assert evidence.encoding is Encoding.TODAY


def test_a_key_in_the_open_is_no_locked_door_so_no_mission_needs_to_name_an_object() -> None:
    view = room(Encoding.TODAY)
    view[0, 4, 2] = (5, 1, 0)
    evidence = Evidence()
    evidence.add(view, "geh zur Kugel", 2)
    assert evidence.encoding is Encoding.TODAY


def test_an_agent_in_sight_fits_no_encoding() -> None:
    view = room(Encoding.TODAY)
    view[0, 4, 2] = (10, 0, 1)
    evidence = Evidence()
    evidence.add(view, "go to the red ball", 2)
    assert evidence.encoding is None
    assert evidence.with_agent == 1
