"""Stores made out of others: what is in them, where it came from, and that nothing leaks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demotools.cli import main
from demotools.errors import StoreError
from demotools.exchange.export import export_pickle
from demotools.exchange.publish import stores_card
from demotools.look.info import info_text, store_info
from demotools.look.report import store_findings
from demotools.look.statistics import store_statistics
from demotools.recording.bot import Style
from demotools.recording.record import generate, planned_recording
from demotools.recording.replay import replay_check
from demotools.store.building import StoreBuilder
from demotools.store.reading import Episodes, Store, open_store, remapped
from demotools.store.reshape import (
    Conditions,
    merge_stores,
    select_store,
    selected_episodes,
    split_store,
)
from demotools.store.verify import verify_store
from tests.conftest import build_store, make_episodes
from tests.store.test_building import folder_bytes


def run(folder: Path, *arguments: object) -> Any:
    """The JSON that a command prints."""
    typed = [*map(str, arguments), "--data-dir", str(folder), "--json"]
    result = CliRunner().invoke(main, typed)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(folder: Path, *arguments: object) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments), "--data-dir", str(folder)])
    assert result.exit_code != 0
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def same(ours: Store, rows: Any, theirs: Store, their_rows: Any) -> bool:
    """Whether these episodes of two stores hold the same."""
    a, b = ours.take(np.asarray(rows)), theirs.take(np.asarray(their_rows))
    columns = ("length", "seed", "view", "direction", "action")
    return a.mission == b.mission and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in columns
    )


def good(path: Path) -> Store:
    failed = [check.text() for check in verify_store(path, quiet=True) if not check.passed]
    assert not failed
    return open_store(path)


@pytest.fixture
def parent(tmp_path: Path) -> Store:
    lengths = np.random.default_rng(0).integers(1, 12, 200).tolist()
    return build_store(tmp_path / "GoToLocal.zarr", make_episodes(lengths))


CONDITIONS: list[tuple[dict[str, Any], Any]] = [
    ({"mission": "red|gr.en"}, lambda e: "red" in e.mission or "green" in e.mission),
    ({"min_len": 4, "max_len": 7}, lambda e: 4 <= len(e) <= 7),
    ({"actions": ("pickup", "done")}, lambda e: {3, 6} <= set(e.actions.tolist())),
    ({"seeds": "10-19,150"}, lambda e: 10 <= e.seed < 20 or e.seed == 150),
    ({"level": "GoToLocal", "first": 9}, lambda e: e.number < 9),
]


@pytest.mark.parametrize(("asked", "fits"), CONDITIONS)
def test_the_episodes_that_fit_are_copied_and_no_others(
    parent: Store, asked: dict[str, Any], fits: Any
) -> None:
    new = parent.path.with_name("Some.zarr")
    made = select_store(parent.path, new, Conditions(**asked), quiet=True)
    rows = [episode.number for episode in parent if fits(episode)]
    store = good(new)
    assert 0 < made.episodes == store.episodes == len(rows) < 200
    assert made.left_out == 200 - len(rows)
    assert same(store, np.arange(len(rows)), parent, rows)
    assert store.attributes.source == parent.attributes.source
    assert store.attributes.parent == {
        "name": "GoToLocal",
        "fingerprint": parent.attributes.fingerprint,
        "episodes": 200,
        "select": {name: list(v) if isinstance(v, tuple) else v for name, v in asked.items()},
    }


def test_a_sample_is_what_shrink_takes(parent: Store) -> None:
    folder = parent.path.parent
    run(folder, "shrink", "GoToLocal", "--episodes", 30, "--seed", 5)
    run(folder, "select", "GoToLocal", "--sample", 30, "--seed", 5, "-o", "sampled")
    shrunk, chosen = (
        open_store(folder / "GoToLocal-small.zarr"),
        open_store(folder / "sampled.zarr"),
    )
    assert shrunk.attributes.fingerprint == chosen.attributes.fingerprint
    run(folder, "shrink", "sampled", "--episodes", 3)
    kept = open_store(folder / "sampled-small.zarr").attributes.parent
    assert kept is not None and kept["parent"] == chosen.attributes.parent


def test_what_cannot_be_selected_is_said(parent: Store) -> None:
    folder = parent.path.parent
    for options, found in [
        (["--mission", "zebra"], "no mission matches 'zebra'"),
        (["--mission", "zebra", "--sample", "3"], "next: the store has 3 missions, such as"),
        (["--min-len", "900"], "no episode matches --min-len 900"),
        (["--seeds", "5-9", "--min-len", "900"], "steps and seeds from"),
        (["--mission", "("], "is not a regular expression"),
        (["--seeds", "1:5"], "this is not a list of seeds"),
        (["--seeds", "gone.txt"], "error: there is no such file"),
        (["--level", "GoTo"], "no episodes of level GoTo"),
        (["--sample", "900"], "only 200 episodes match, but --sample asks for 900"),
        (["--actions", "jump"], "'jump' is not one of left"),
        (["--first", "3", "--sample", "3"], "--first cannot be combined with --sample"),
        (["--first", "3", "-o", "GoToLocal", "--overwrite"], "replace one of its own sources"),
    ]:
        assert found in refused(folder, "select", "GoToLocal", *options)
    assert [path.name for path in folder.glob("*.zarr")] == ["GoToLocal.zarr"]


def test_a_store_alone_is_not_merged(parent: Store) -> None:
    folder = parent.path.parent
    assert "one store alone" in refused(folder, "merge", "GoToLocal", "-o", "new")
    assert not (folder / "new.zarr").exists()
    run(folder, "merge", "GoToLocal", "--dedupe", "-o", "new")
    assert open_store(folder / "new.zarr").episodes <= parent.episodes


@pytest.fixture
def two_levels(tmp_path: Path) -> list[Store]:
    """Stores of two levels with the same seeds; an episode of the second is one of the first."""
    first = build_store(tmp_path / "GoToLocal.zarr", make_episodes([3, 2, 4, 1]))
    other = make_episodes([5, 1, 2], seed=1)
    planted = Episodes.concatenated([other, first.take(np.array([2]))])
    planted = replace(planted, seed=np.array([0, 1, 2, 60]))
    return [first, build_store(tmp_path / "GoTo.zarr", planted, level="GoTo")]


def test_a_merge_holds_the_episodes_of_all_with_their_levels_and_where_they_came_from(
    two_levels: list[Store], tmp_path: Path
) -> None:
    first, second = two_levels
    made = run(tmp_path, "merge", "GoToLocal", "GoTo", "-o", "both")
    assert (made["episodes"], made["duplicates"], made["repeated_seeds"]) == (8, 1, 0)
    store = good(tmp_path / "both.zarr")
    assert same(store, [0, 1, 2, 3], first, np.arange(4))
    assert same(store, [4, 5, 6, 7], second, np.arange(4))
    assert store.level == "mixed" and store.levels == ("GoToLocal", "GoTo")
    assert store.episode_level.tolist() == [0] * 4 + [1] * 4
    assert store.attributes.environment_id is None
    assert "mixed (GoToLocal, GoTo)" in info_text(store_info(store.path))
    assert "(environment: GoToLocal, GoTo)" in stores_card([store.path])
    entries = store.attributes.merged_from
    assert [entry["fingerprint"] for entry in entries] == [
        one.attributes.fingerprint for one in two_levels
    ]
    assert [entry["source"] for entry in entries] == [one.attributes.source for one in two_levels]
    deduped = run(tmp_path, "merge", "GoToLocal", "GoTo", "--dedup", "-o", "once")
    assert (deduped["episodes"], deduped["left_out"]) == (7, 1)
    assert same(open_store(tmp_path / "once.zarr"), np.arange(7), store, np.arange(7))


def test_one_level_of_a_merge_can_be_taken_out_again(
    two_levels: list[Store], tmp_path: Path
) -> None:
    run(tmp_path, "merge", "GoToLocal", "GoTo")
    run(tmp_path, "select", "merged", "--level", "GoTo", "-o", "GoTo-again")
    again = good(tmp_path / "GoTo-again.zarr")
    assert again.attributes.fingerprint == two_levels[1].attributes.fingerprint
    assert (again.level, again.levels) == ("GoTo", ("GoTo",))
    assert again.attributes.environment_id == "BabyAI-GoTo-v0"
    assert again.attributes.source["kind"] == "merge"


@pytest.mark.usefixtures("two_levels")
def test_a_merge_of_one_level_is_of_that_level_and_finds_wrong_missions(tmp_path: Path) -> None:
    made = run(tmp_path, "merge", "GoToLocal", "GoToLocal", "-o", "twice")
    assert made["repeated_seeds"] == 4
    twice = open_store(tmp_path / "twice.zarr")
    assert (twice.level, len(twice)) == ("GoToLocal", 8)
    build_store(
        tmp_path / "Open.zarr",
        replace(make_episodes([2]), mission=["open a red door"]),
        level="Open",
    )
    build_store(tmp_path / "Wrong.zarr", make_episodes([2]), level="Open")
    run(tmp_path, "merge", "GoTo", "Open", "-o", "right")
    good(tmp_path / "right.zarr")
    run(tmp_path, "merge", "GoTo", "Wrong", "-o", "wrong")
    failed = [c for c in verify_store(tmp_path / "wrong.zarr", quiet=True) if not c.passed]
    assert [check.name for check in failed] == ["missions against the level's grammar"]


@pytest.mark.usefixtures("two_levels")
def test_stores_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    build_store(tmp_path / "V.zarr", make_episodes([2]), split="valid")
    images = replace(make_episodes([2]), view=np.zeros((2, 8, 8, 3), np.uint8))
    build_store(tmp_path / "I.zarr", images)
    assert "set the split of the merged store" in refused(tmp_path, "merge", "GoToLocal", "V")
    assert "views differ in shape" in refused(tmp_path, "merge", "GoToLocal", "I")
    run(tmp_path, "merge", "GoToLocal", "V", "--split", "train", "-o", "all")
    assert open_store(tmp_path / "all.zarr").attributes.split == "train"


LISTS = st.lists(st.integers(0, 25), min_size=10, max_size=60)


@given(content=LISTS, seeds=LISTS, share=st.sampled_from([0.05, 0.3, 3]))
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_split_never_leaks_and_loses_nothing(
    tmp_path: Path, content: list[int], seeds: list[int], share: float
) -> None:
    """Episodes that repeat each other, in what they hold or in their seeds only."""
    size = min(len(content), len(seeds))
    episodes = make_episodes([2] * 26).take(np.array(content[:size]))
    episodes = replace(episodes, seed=np.array(seeds[:size]) - 1)
    store = build_store(tmp_path / "GoToLocal.zarr", episodes)
    paths = tmp_path / "a.zarr", tmp_path / "b.zarr"
    try:
        made = split_store(store.path, *paths, share=share, overwrite=True, quiet=True)
    except StoreError as error:
        assert "one side would be empty" in error.what
        return
    train, valid = map(open_store, paths)
    wanted = share if share >= 1 else round(share * size)
    assert made[1].episodes <= wanted
    assert train.episodes + valid.episodes == size
    counted = [store_statistics(one, quiet=True) for one in (train, valid)]
    findings = {finding.name: finding for finding in store_findings(counted, None)}
    assert findings["duplicates between stores"].figures["shared"] == 0
    assert findings["seed overlap"].figures["shared"] == 0

    def held(*stores: Store) -> list[tuple[Any, ...]]:
        every = [episode for one in stores for episode in one]
        return sorted((e.mission, e.seed, e.cells.tobytes(), e.actions.tobytes()) for e in every)

    assert held(train, valid) == held(store)


def test_a_split_has_the_share_asked_for_and_passes_every_check(parent: Store) -> None:
    folder = parent.path.parent
    made = run(folder, "split", "GoToLocal", "--valid", 0.1)
    train, valid = (good(folder / f"GoToLocal-{part}.zarr") for part in ("train", "valid"))
    assert [one["episodes"] for one in made] == [train.episodes, valid.episodes] == [180, 20]
    assert (train.attributes.split, valid.attributes.split) == ("train", "valid")
    run(folder, "split", "GoToLocal", "--valid", 20, "--seed", 1, "-o", "other")
    other = open_store(folder / "other-valid.zarr")
    assert other.episodes == 20 and other.episode_seed.tolist() != valid.episode_seed.tolist()
    twice = build_store(folder / "Twice.zarr", make_episodes([1]), make_episodes([1]))
    assert "one side would be empty" in refused(folder, "split", twice.name, "--valid", 0.5)


def test_optional_arrays_go_along_and_are_filled_where_a_store_has_none(tmp_path: Path) -> None:
    style = Style(noise=0.2, subgoals=True)
    noisy, plain = tmp_path / "N.zarr", tmp_path / "P.zarr"
    generate(planned_recording("GoToLocal", 6, style=style), noisy, workers=1, quiet=True)
    recording = planned_recording("GoToObj", 6, first_seed=50)
    generate(recording, plain, workers=1, quiet=True)
    merge_stores([noisy, plain], tmp_path / "M.zarr", quiet=True)
    merged = good(tmp_path / "M.zarr")
    first, second = open_store(noisy), open_store(plain)
    steps = first.steps
    for name, otherwise in (("taken", second.action), ("subgoal", None)):
        array = merged.optional[name]
        assert np.array_equal(array.span(0, steps), first.optional[name].span(0, steps))
        rest = array.span(steps, merged.steps)
        expected = otherwise.span(0, second.steps) if otherwise else np.zeros(second.steps)
        assert np.array_equal(rest, expected)
    assert all(
        np.array_equal(ours["taken"], it["taken"])
        for ours, it in zip(merged[:6], first, strict=True)
    )
    check = replay_check(merged, 12, quiet=True)
    assert check.passed and check.note.startswith("12 of 12 episodes")
    assert "advice" in check.note
    exported = export_pickle(merged, tmp_path / "M.pkl", quiet=True)
    assert exported.note == "this format has no seeds and no `taken` and no `subgoal`"


def test_a_seed_that_is_wrong_after_a_merge_is_blamed_on_the_store(tmp_path: Path) -> None:
    for level in ("GoToLocal", "GoToObj"):
        path = tmp_path / f"{level}.zarr"
        generate(planned_recording(level, 3), path, workers=1, quiet=True)
    stores = [open_store(tmp_path / f"{level}.zarr") for level in ("GoToLocal", "GoToObj")]
    wrong = replace(stores[0].take(np.arange(3)), seed=np.array([7, 8, 9]))
    with StoreBuilder(stores[0].path, {"wrong": 1}, overwrite=True) as builder:
        from demotools.store.building import write_part

        write_part(builder.parts, 0, wrong, {})
        about = stores[0].attributes
        builder.finish(
            level=about.level,
            split="train",
            environment_id=about.environment_id,
            licence="",
            citation="",
            source=about.source,
        )
    merge_stores([tmp_path / "GoToLocal.zarr", stores[1].path], tmp_path / "M.zarr", quiet=True)
    check = replay_check(open_store(tmp_path / "M.zarr"), 6, quiet=True)
    assert len(check.problems) == 3


def test_the_same_is_made_bit_for_bit_whatever_came_between(
    two_levels: list[Store], tmp_path: Path
) -> None:
    paths = [store.path for store in two_levels]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        merge_stores(paths, tmp_path / name / "M.zarr", quiet=True)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_selecting_by_a_number_of_episodes_costs_no_unpacked_missions(parent: Store) -> None:
    assert len(selected_episodes(parent, Conditions(first=3))) == 3
    assert "mission_text" not in vars(parent)


@pytest.mark.slow
def test_a_million_episodes_are_merged_and_split_in_bounded_memory(tmp_path: Path) -> None:
    """`benchmarks/bench_reshape.py` prints it; here only the limit."""
    command = [sys.executable, "benchmarks/bench_reshape.py", str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    peaks = [float(line.split()[-2]) for line in done.stdout.splitlines() if line.endswith(" MB")]
    assert len(peaks) == 3
    assert max(peaks) <= 400


def test_the_solved_episodes_of_a_recording_with_failures_can_be_taken_out(tmp_path: Path) -> None:
    for name, style in (("all", Style(failures=True)), ("plain", Style())):
        recording = planned_recording("GoToImpUnlock", 2, first_seed=5, style=style)
        generate(recording, tmp_path / f"{name}.zarr", workers=1, quiet=True)
    assert run(tmp_path, "select", "all", "--solved", "-o", "solved")["episodes"] == 1
    solved = good(tmp_path / "solved.zarr")
    assert solved.episode_seed.tolist() == [5]
    assert solved.optional["reward"].span(0, solved.steps).max() > 0
    assert run(tmp_path, "select", "all", "--ended", "success", "-o", "same")["episodes"] == 1
    assert good(tmp_path / "same.zarr").attributes == solved.attributes
    rest = run(tmp_path, "select", "all", "--ended", "failed,truncated", "-o", "rest")
    assert rest["episodes"] == 1
    assert "success" not in good(tmp_path / "rest.zarr").ends
    told = refused(tmp_path, "select", "all", "--ended", "unknown", "-o", "none")
    assert "no episode matches --ended unknown" in told
    # a store without rewards holds solved episodes only
    told = refused(tmp_path, "merge", "plain", "all")
    assert "it has unsolved episodes, but plain has no rewards" in told
    assert run(tmp_path, "merge", "solved", "plain", "-o", "both")["no_rewards"] == "plain"
    both, plain = open_store(tmp_path / "both.zarr"), open_store(tmp_path / "plain.zarr")
    assert both.episodes == 1 + plain.episodes and "reward" not in both.optional
    assert run(tmp_path, "merge", "solved", "all", "-o", "more")["no_rewards"] is None
    assert "reward" in open_store(tmp_path / "more.zarr").optional
    # a store of rewards alone, as they were before there were terminations
    take = open_store(tmp_path / "solved.zarr").take(np.array([0]))
    rewards = {"reward": take.optional["reward"]}
    build_store(tmp_path / "old.zarr", replace(take, optional=rewards), level="GoToImpUnlock")
    pair = [tmp_path / f"{name}.zarr" for name in ("all", "old")]
    older = merge_stores(pair, tmp_path / "older.zarr")
    assert set(open_store(older.path).optional) == {"reward"}
    assert "\n  no terminations: old has none" in older.text() and older.no_rewards is None
    # where none has any, none lack them
    assert run(tmp_path, "merge", "plain", "both", "-o", "bare")["no_rewards"] is None


@pytest.mark.slow
def test_a_merge_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        build_store(tmp_path / f"{name}.zarr", make_episodes([3] * 40_000, seed=seed))
    command = [sys.executable, "-m", "demotools", "merge", "a", "b", "--data-dir", str(tmp_path)]
    subprocess.run([*command, "-o", "whole"], check=True, capture_output=True)
    parts = tmp_path / ".merged.zarr.building" / "parts"
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(list(parts.glob("*.npy"))) < 3:
        assert program.poll() is None
        time.sleep(0.001)
    program.kill()
    program.wait()
    assert not (tmp_path / "merged.zarr").exists()
    subprocess.run(command, check=True, capture_output=True)
    merged, whole = folder_bytes(tmp_path / "merged.zarr"), folder_bytes(tmp_path / "whole.zarr")
    assert merged == whole


def test_a_store_replaced_since_it_was_opened_gives_what_it_gave(tmp_path: Path) -> None:
    store = build_store(tmp_path / "GoToLocal.zarr", make_episodes([3, 2, 4]))
    assert remapped(store) is not store
    store.path.rename(tmp_path / "old.zarr")
    build_store(store.path, make_episodes([1, 5]))
    assert remapped(store) is store
    assert selected_episodes(store, Conditions(min_len=3)).tolist() == [0, 2]
