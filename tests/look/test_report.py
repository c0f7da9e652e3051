"""What `demotools report` counts and finds; a browser opens its page without a complaint."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import demotools.store.duplicates
from demotools.babyai.cells import ACTIONS
from demotools.cli import main
from demotools.errors import StoreError
from demotools.look.report import Finding, common, store_findings, store_report
from demotools.look.statistics import store_statistics
from demotools.store.duplicates import episode_hashes, hashes
from demotools.store.reading import Episodes, Store, open_store
from demotools.store.reshape import merge_stores
from demotools.store.shrink import shrink_stores
from demotools.store.verify import verify_store
from tests.browser import colours_of_page, needs_chromium
from tests.conftest import MISSIONS, build_store, make_episodes


def finding(stores: list[Store], name: str, instruction_len: int | None = None) -> Finding:
    """The last finding of that name: of the last store or pair."""
    statistics = [store_statistics(store, quiet=True) for store in stores]
    return [one for one in store_findings(statistics, instruction_len) if one.name == name][-1]


@pytest.fixture
def train_and_valid(make_store: Callable[..., Store], tmp_path: Path) -> tuple[Store, Store]:
    """Two stores that share one episode, number 2 of train and number 3 of valid."""
    train = make_store(lengths=[3, 2, 4, 1])
    planted = replace(train.take(np.array([2])), seed=np.array([1_000_000_003]))
    own = replace(make_episodes([5, 2, 3], seed=7), seed=np.arange(1_000_000_000, 1_000_000_003))
    valid = build_store(
        tmp_path / "GoToLocal-valid.zarr", Episodes.concatenated([own, planted]), split="valid"
    )
    return train, valid


def test_a_planted_duplicate_between_train_and_valid_is_found(
    train_and_valid: tuple[Store, Store],
) -> None:
    found = finding(list(train_and_valid), "duplicates between stores")
    assert found.alarm
    assert found.figures == {
        **{"shared": 1, "share": 0.25, "both": 1},
        **{"only_first": 3, "only_second": 3, "same_order": False},
    }
    planted, *others = found.details
    assert planted.startswith("episode 2 of GoToLocal is episode 3 of GoToLocal-valid: go to")
    alone = [f"episode {n} is only in GoToLocal: " for n in (0, 1, 3)]
    alone += [f"episode {n} is only in GoToLocal-valid: " for n in range(3)]
    assert [told.partition(": ")[0] + ": " for told in others] == alone


def test_stores_without_a_common_episode_or_seed_are_fine(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    other = replace(make_episodes([3, 2, 4], seed=1), seed=np.arange(100, 103))
    stores = [make_store(lengths=[3, 2, 4]), build_store(tmp_path / "other.zarr", other)]
    assert finding(stores, "duplicates between stores").text == "no episode is in both"
    assert finding(stores, "seed overlap").text == "no seed is in both"


def episode_hash(one: Episodes) -> int:
    """The hash of a single episode."""
    mission = hashes(text.encode() for text in one.mission)
    return int(episode_hashes(mission, one.offset, one.view, one.action)[0])


@given(
    change=st.sampled_from(["view", "action", "mission", "length"]),
    step=st.integers(0, 8),
    cell=st.integers(0, 48),
    by=st.integers(1, 6),
)
def test_an_episode_changed_anywhere_in_what_counts_has_another_hash(
    change: str, step: int, cell: int, by: int
) -> None:
    before = make_episodes([9])
    after = replace(before, view=before.view.copy(), action=before.action.copy())
    if change == "view":
        after.view[step].flat[cell] = (int(after.view[step].flat[cell]) + by) % 198
    elif change == "action":
        after.action[step] = (after.action[step] + by) % 7
    elif change == "mission":
        after = replace(after, mission=[MISSIONS[1]])
    else:
        kept = slice(9 - by)
        after = replace(
            after, length=np.array([9 - by]), view=after.view[kept], action=after.action[kept]
        )
    assert episode_hash(before) != episode_hash(after)


def test_seeds_and_directions_do_not_change_the_hash(tmp_path: Path) -> None:
    before = make_episodes([3, 2])
    after = replace(before, seed=before.seed + 5, direction=(before.direction + 1) % 4)
    one, other = (
        store_statistics(build_store(tmp_path / f"{name}.zarr", episodes), quiet=True).episode_hash
        for name, episodes in (("a", before), ("b", after))
    )
    assert np.array_equal(one, other)


def test_two_steps_that_change_places_change_the_hash() -> None:
    before = make_episodes([2])
    after = replace(before, view=before.view[::-1], action=before.action[::-1])
    assert episode_hash(before) != episode_hash(after)


def test_hashes_and_counts_do_not_depend_on_how_the_store_is_cut_into_blocks(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(lengths=[3, 2, 40, 1, 1, 7, 5])
    whole = store_statistics(store, quiet=True)
    monkeypatch.setattr(demotools.store.duplicates, "_BLOCK_BYTES", 5 * 49)
    monkeypatch.setattr(demotools.store.duplicates, "_MAPPED_BYTES", 100)
    cut = store_statistics(store, quiet=True)
    assert np.array_equal(whole.episode_hash, cut.episode_hash)
    assert np.array_equal(whole.cell_counts, cut.cell_counts)  # type: ignore[arg-type]
    assert np.array_equal(whole.action_steps, cut.action_steps)


def test_a_store_replaced_while_it_is_read_is_refused(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=[3, 2])
    make_store(lengths=[3, 2], seed=5)
    with pytest.raises(StoreError, match="replaced while it was in use"):
        store_statistics(store, quiet=True)


def test_cells_actions_and_words_are_counted_as_a_plain_loop_counts_them(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=[3, 2, 4, 1])
    found = store_statistics(store, quiet=True)
    assert found.cell_counts is not None
    codes = [int(code) for code in store.view.span(0, 10).ravel()]
    assert found.cell_counts[4, 2, 1] == codes.count(4 * 18 + 2 * 3 + 1)
    assert found.cell_counts.sum() == len(codes)
    actions = store.action.span(0, 10).tolist()
    assert found.action_steps.tolist() == [actions.count(n) for n in range(len(ACTIONS))]
    words = found.as_json()["word_episodes"]
    missions = [MISSIONS[0], MISSIONS[1], MISSIONS[2], MISSIONS[0]]
    assert words == {word: sum(word in mission.split() for mission in missions) for word in words}
    assert set(words) == {word for mission in missions for word in mission.split()}


def test_a_word_that_stands_twice_in_a_mission_counts_one_episode(tmp_path: Path) -> None:
    episodes = replace(make_episodes([2]), mission=["go to the red ball then go to the red key"])
    words = store_statistics(build_store(tmp_path / "a.zarr", episodes), quiet=True).as_json()
    assert set(words["word_episodes"].values()) == {1}


def test_repeated_episodes_and_seeds_within_a_store_are_found(tmp_path: Path) -> None:
    episodes = make_episodes([3, 2])
    store = build_store(tmp_path / "GoToLocal.zarr", Episodes.concatenated([episodes, episodes]))
    found = finding([store], "duplicates within the store")
    assert found.alarm
    assert found.figures == {"repeated": 2, "same_seed": 2}
    assert set(found.details) == {
        f"episodes 0 and 2: {MISSIONS[0]}",
        f"episodes 1 and 3: {MISSIONS[1]}",
    }
    assert finding([store], "seeds").figures["repeated"] == 2


def test_seeds_that_two_stores_of_a_level_share_are_found(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    train = make_store(lengths=[3, 2, 4])
    other = replace(make_episodes([2, 2], seed=3), seed=np.array([2, 9]))
    overlap = finding([train, build_store(tmp_path / "b.zarr", other)], "seed overlap")
    assert (overlap.alarm, overlap.figures, overlap.details) == (True, {"shared": 1}, ("seed 2",))
    elsewhere = build_store(tmp_path / "c.zarr", other, level="BossLevel")
    assert not finding([train, elsewhere], "seed overlap").alarm
    unknown = build_store(tmp_path / "d.zarr", replace(other, seed=np.array([-1, -1])))
    assert "unknown" in finding([train, unknown], "seed overlap").text


def test_seeds_that_evaluation_keeps_to_itself_are_found(tmp_path: Path) -> None:
    episodes = replace(make_episodes([2]), seed=np.array([2_000_000_005]))
    found = finding([build_store(tmp_path / "a.zarr", episodes)], "seeds")
    assert (found.alarm, found.figures["outside_split"]) == (True, 1)


def test_missions_out_of_grammar_are_found_with_their_episodes(tmp_path: Path) -> None:
    missions = ["go to the red ball", "open the red door", "open the red door", "fly away"]
    store = build_store(tmp_path / "a.zarr", replace(make_episodes([1] * 4), mission=missions))
    name = "missions against the level's grammar"
    found = finding([store], name)
    assert found.alarm
    assert found.figures == {"checked": True, "missions": 2, "episodes": 3}
    assert found.details == ("'open the red door'", "'fly away'")
    build_store(tmp_path / "c.zarr", make_episodes([1]), level="GoToObj")
    merge_stores([tmp_path / "c.zarr", store.path], tmp_path / "d.zarr", quiet=True)
    merged = open_store(tmp_path / "d.zarr")
    assert "not missions of GoToObj or GoToLocal" in finding([merged], name).text
    told = [one.problems for one in verify_store(merged.path, quiet=True) if one.name == name]
    assert all("not a mission of GoToObj or GoToLocal: '" in problem for problem in told[0])
    assert len(told[0]) == 2
    foreign = build_store(tmp_path / "b.zarr", make_episodes([1]), level="MyOwnLevel")
    assert finding([foreign], name).text == "not checked: the level MyOwnLevel has no manifest"


def test_the_share_of_episodes_cut_by_an_instruction_length_is_told(tmp_path: Path) -> None:
    missions = ["go to the red ball", "go to the red ball then go to a box"]
    episodes = replace(make_episodes([1] * 4), mission=[missions[0], *[missions[1]] * 3])
    stores = [build_store(tmp_path / "a.zarr", episodes)]
    name = "missions cut by the instruction length"
    cut = finding(stores, name, 5)
    assert (cut.alarm, cut.figures) == (True, {"longest": 10, "episodes": 3})
    assert cut.text.startswith("3 of 4 episodes (75%)")
    assert not finding(stores, name, 10).alarm
    assert not finding(stores, name).alarm


def test_one_action_in_nearly_all_steps_is_an_alarm(tmp_path: Path) -> None:
    action = np.array([2] * 9 + [0], dtype=np.uint8)
    store = build_store(tmp_path / "a.zarr", replace(make_episodes([10]), action=action))
    found = finding([store], "balance of actions")
    assert found.alarm
    assert "forward is 90.0% of the steps" in found.text
    assert "never: right, pickup, drop, toggle, done" in found.text


def compared(one: Store, other: Store) -> tuple[Finding, Finding, Finding]:
    """What is found of the episodes, the missions and the attributes of two stores."""
    names = ("duplicates between stores", "missions of two stores", "attributes of two stores")
    episodes, missions, attributes = (finding([one, other], name) for name in names)
    return episodes, missions, attributes


def sides(found: Finding) -> tuple[int, int, int]:
    """How many are in both stores, only in the first, only in the second."""
    return found.figures["both"], found.figures["only_first"], found.figures["only_second"]


def test_a_store_and_its_copy_differ_in_nothing(make_store: Callable[..., Store]) -> None:
    one, other = make_store(lengths=[3, 2]), make_store(lengths=[3, 2], name="Copy")
    episodes, missions, attributes = compared(one, other)
    # the test's own stores name themselves nowhere
    assert attributes.figures == {}
    assert attributes.text == "all the same"
    assert (sides(episodes), sides(missions)) == ((2, 0, 0), (2, 0, 0))
    assert episodes.figures["same_order"]
    assert episodes.text.endswith("and no others, in the same order")


def test_a_small_twin_is_a_part_of_its_parent(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    parent = make_store(lengths=[3, 2, 4, 1, 6, 2])
    (made,) = shrink_stores([parent.path], tmp_path, episodes=4, seed=0, quiet=True)
    episodes, _missions, attributes = compared(parent, open_store(made.path))
    assert sides(episodes) == (4, 2, 0)
    assert "parent" in attributes.figures
    assert not episodes.figures["same_order"]
    twin = open_store(made.path)
    surveys = [store_statistics(one, quiet=True) for one in (parent, twin)]
    alarms = {found.name for found in store_findings(surveys, None) if found.alarm}
    assert "duplicates between stores" not in alarms and "seed overlap" not in alarms


def test_episodes_in_another_order_are_the_same_and_it_is_said(tmp_path: Path) -> None:
    one = build_store(tmp_path / "a.zarr", make_episodes([3, 2]))
    other = build_store(tmp_path / "b.zarr", one.take(np.array([1, 0])))
    episodes, _missions, _attributes = compared(one, other)
    assert sides(episodes) == (2, 0, 0)
    assert "in another order" in episodes.text


def test_what_is_in_one_store_only_is_shown_with_its_mission(tmp_path: Path) -> None:
    one = build_store(tmp_path / "a.zarr", make_episodes([3, 2]))
    changed = replace(make_episodes([3, 2]), mission=[MISSIONS[0], "go to the lamp"])
    other = build_store(tmp_path / "b.zarr", changed, split="valid")
    episodes, missions, attributes = compared(one, other)
    assert attributes.figures["split"] == ["train", "valid"]
    assert "split: train | valid" in attributes.details
    assert missions.details == (f"only in a: {MISSIONS[1]}", "only in b: go to the lamp")
    assert missions.text == "1 in both, 1 only in a, 1 only in b"
    assert episodes.details[1:] == (
        f"episode 1 is only in a: {MISSIONS[1]}",
        "episode 1 is only in b: go to the lamp",
    )


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_repeated_episodes_are_counted_as_a_multiset_counts_them(
    first: list[int], second: list[int]
) -> None:
    found = common(np.array(first, dtype=np.uint64), np.array(second, dtype=np.uint64))
    assert found == (Counter(first) & Counter(second)).total()


class Page(HTMLParser):
    """The texts and the addresses of a page, and whether its tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_needs_no_network_and_shows_what_was_found(
    train_and_valid: tuple[Store, Store],
) -> None:
    report = store_report([store.path for store in train_and_valid], quiet=True)
    page = Page(report.html)
    assert page.open == []
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?://", report.html)
    text = " ".join(page.text.split())
    assert "1 to look into" in text
    assert "1 of 4 episodes (25%) of GoToLocal-valid are also in GoToLocal" in text
    for expected in ("egocentric view, one byte a cell", "10 × 7 × 7", "GoToLocal, valid split"):
        assert expected in text


def test_the_gallery_holds_every_step_of_eight_episodes(make_store: Callable[..., Store]) -> None:
    store = make_store(lengths=range(1, 21))
    html = store_report([store.path], quiet=True).html
    gifs = [
        Image.open(io.BytesIO(base64.b64decode(address.partition("base64,")[2])))
        for address in Page(html).addresses
        if address.startswith("data:image/gif")
    ]
    counts = [getattr(gif, "n_frames") for gif in gifs]  # noqa: B009
    assert counts == [1, 4, 6, 9, 12, 15, 17, 20]


def test_texts_of_a_store_cannot_become_markup(tmp_path: Path) -> None:
    mission = 'go to <script>alert(1)</script> & "box"'
    episodes = replace(make_episodes([2]), mission=[mission])
    html = store_report([build_store(tmp_path / "a.zarr", episodes).path], quiet=True).html
    assert "<script" not in html
    assert mission in Page(html).text


def test_a_store_of_pixels_has_a_report_without_a_table_of_objects(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 56, 56, 3), dtype=np.uint8)
    store = build_store(tmp_path / "a.zarr", replace(make_episodes([3, 2]), view=pixels))
    report = store_report([store.path], quiet=True)
    assert "Objects and colours" not in report.html
    shown = report.as_json()
    assert shown["stores"][0]["object_cells"] == {}
    assert json.dumps(shown)  # of nothing but what JSON has


def run_report(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["report", *arguments, "--data-dir", str(folder)])


def test_the_command_writes_one_file_and_does_not_replace_it_unasked(
    train_and_valid: tuple[Store, Store], tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    stores = [store.name for store in train_and_valid]
    result = run_report(tmp_path, *stores, "-o", str(file))
    assert result.exit_code == 0, result.output
    assert "LOOK  GoToLocal, GoToLocal-valid: duplicates between stores" in result.output
    before = file.read_bytes()
    again = run_report(tmp_path, *stores, "-o", str(file))
    assert again.exit_code == 1
    assert "add --overwrite" in again.output
    assert file.read_bytes() == before


def test_json_tells_figures_and_findings_and_writes_no_file(
    train_and_valid: tuple[Store, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_report(tmp_path, *(store.name for store in train_and_valid), "--json", "-q")
    found = json.loads(result.output)
    assert [store["episodes"] for store in found["stores"]] == [4, 4]
    (shared,) = [one["figures"] for one in found["findings"] if one["alarm"]]
    assert (shared["shared"], shared["share"]) == (1, 0.25)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_store_is_said_before_anything_is_written(tmp_path: Path) -> None:
    result = run_report(tmp_path, "NoSuchStore", "-o", str(tmp_path / "report.html"))
    assert result.exit_code == 1
    assert "there is no such demo store" in result.output
    assert list(tmp_path.iterdir()) == []


@needs_chromium
@pytest.mark.parametrize("size", [(1200, 900), (390, 844)])
def test_chromium_opens_the_page_without_a_complaint(
    train_and_valid: tuple[Store, Store], tmp_path: Path, size: tuple[int, int]
) -> None:
    file = tmp_path / "report.html"
    report = store_report([store.path for store in train_and_valid], quiet=True)
    file.write_text(report.html, "utf-8")
    assert len(colours_of_page(file, tmp_path, size)) > 50


def test_where_a_merged_store_came_from_is_told_in_words(tmp_path: Path) -> None:
    for name in "ab":
        build_store(tmp_path / f"{name}.zarr", make_episodes([1]))
    merge_stores([tmp_path / "a.zarr", tmp_path / "b.zarr"], tmp_path / "c.zarr", quiet=True)
    page = store_report([tmp_path / "c.zarr"], quiet=True).html
    shown = " ".join(re.sub("<[^>]*>", " ", page.split("Where it came from")[1]).split())
    assert "stores 2 name b " in shown and "stores 1 episodes 1 " in shown
    # licence and citation once, for all; nothing as Python spells it
    assert shown.count(" licence ") == shown.count(" citation ") == 1
    assert "None" not in shown and "{" not in shown and "&#39;" not in shown
