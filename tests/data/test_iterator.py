from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demotools.babyai.cells import UNPACKING_TABLE
from demotools.babyai.vocabulary import WORDS
from demotools.errors import CheckpointError, DemotoolsError, SettingsError, StoreError
from demotools.store.reading import Store, open_store
from tests.conftest import build_store, make_episodes
from tests.data.test_order import permutation
from trainer.batch import Batch
from trainer.data.augment import Augmenter
from trainer.data.batches import Buffers, mapped_column
from trainer.data.iterator import ExpertTrajectoryIterator
from trainer.data.sources import Source

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
MakeStore = Callable[..., Store]


def reference_queue(store: Store, rollout: int, rollouts: int, seed: int) -> Iterator[int]:
    """Steps of the store as one rollout plays them, for ever: DESIGN section 4, word for word."""
    epoch = 0
    while True:
        order = permutation(seed, epoch, store.episodes).tolist()
        for episode in order[rollout::rollouts]:
            yield from range(store.episode_offset[episode], store.episode_offset[episode + 1])
        epoch += 1


def equal(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize(
    ("given", "what"),
    [({}, "unpacked"), ({"layout": "native", "residence": "device"}, "on the CPU")],
)
def test_an_augmenter_that_could_not_work_is_refused(
    make_store: MakeStore, given: dict[str, Any], what: str
) -> None:
    store = make_store(lengths=LENGTHS)
    augmenter = Augmenter(["mirror"], WORDS, seed=1)
    with pytest.raises(SettingsError, match=what) as refused:
        ExpertTrajectoryIterator(store, rollouts=4, rollout_len=2, augmenter=augmenter, **given)
    assert "augmenter" in refused.value.fix


@pytest.mark.parametrize("residence", ["map", "device"])
def test_three_epochs_equal_a_plain_queue_for_each_rollout(
    make_store: MakeStore, residence: Any
) -> None:
    store = make_store(lengths=LENGTHS)
    B, T, seed = 4, 2, 3  # 17 batches and more: three blocks of the planner
    queues = [reference_queue(store, b, B, seed) for b in range(B)]
    native = ExpertTrajectoryIterator(
        store, rollouts=B, rollout_len=T, seed=seed, layout="native", residence=residence
    )
    tutorial = ExpertTrajectoryIterator(
        store, rollouts=B, rollout_len=T, seed=seed, residence=residence
    )
    cells, action = store.view.chunks[0], store.action.chunks[0]
    shown = np.zeros(store.steps, dtype=int)
    while native.epoch < 3:
        ours, theirs = next(native), next(tutorial)
        for b in range(B):
            for t in range(T):
                step = next(queues[b])
                shown[step] += 1
                episode = int(np.searchsorted(store.episode_offset, step, side="right")) - 1
                mission = store.episode_mission[episode]
                begins = step == store.episode_offset[episode]
                assert ours["cells"][t, b].numpy().tolist() == cells[step].tolist()
                assert ours["expert_action"][t, b] == theirs["expert_action"][t, b] == action[step]
                assert ours["direction"][t, b] == store.direction.chunks[0][step]
                assert ours["mission"][t, b] == mission
                assert ours["masks"][t, b] == theirs["masks"][t, b, 0] == (0 if begins else 1)
                image = theirs["minigrid_ego_image"][t, b].numpy()
                assert (image == UNPACKING_TABLE[cells[step]]).all()
                words = theirs["minigrid_mission"][t, b].tolist()
                assert words == store.mission_tokens[mission].tolist()
    assert shown.min() >= 3
    assert native.demo_steps == shown.sum()


def test_the_layouts_have_the_shapes_and_types_of_the_contract(make_store: MakeStore) -> None:
    store = make_store(lengths=LENGTHS)
    tutorial = ExpertTrajectoryIterator(store, rollouts=3, rollout_len=2, instruction_len=7)
    native = ExpertTrajectoryIterator(store, rollouts=3, rollout_len=2, layout="native")
    assert {name: (tuple(a.shape), a.dtype) for name, a in next(tutorial).items()} == {
        "minigrid_ego_image": ((2, 3, 7, 7, 3), torch.uint8),
        "minigrid_mission": ((2, 3, 7), torch.int64),
        "expert_action": ((2, 3), torch.int64),
        "masks": ((2, 3, 1), torch.float32),
    }
    assert {name: (tuple(a.shape), a.dtype) for name, a in next(native).items()} == {
        "cells": ((2, 3, 7, 7), torch.uint8),
        "mission": ((2, 3), torch.int32),
        "expert_action": ((2, 3), torch.uint8),
        "masks": ((2, 3), torch.uint8),
        "direction": ((2, 3), torch.uint8),
    }


def test_missions_are_padded_or_cut_to_the_length_asked_for(make_store: MakeStore) -> None:
    store = make_store(lengths=LENGTHS)
    stored = store.mission_tokens.tolist()
    for length in (1, 5, 9):
        rollouts = ExpertTrajectoryIterator(
            store, rollouts=2, rollout_len=3, instruction_len=length
        )
        padded = [(row + [0] * length)[:length] for row in stored]
        assert rollouts.mission_tokens.tolist() == padded
        for words in next(rollouts)["minigrid_mission"].reshape(-1, length).tolist():
            assert words in padded


lengths_of_stores = st.lists(st.integers(1, 12), min_size=1, max_size=40)


@given(data=st.data(), lengths=lengths_of_stores)
@settings(max_examples=30)
def test_any_stream_stopped_anywhere_resumes_bit_for_bit_on_any_world(
    data: st.DataObject, lengths: list[int]
) -> None:
    rollouts = data.draw(st.integers(1, len(lengths)), "rollouts")
    worlds = [world for world in range(1, rollouts + 1) if rollouts % world == 0]
    kinds: dict[str, Any] = {
        "rollouts": rollouts,
        "rollout_len": data.draw(st.integers(1, 20), "rollout_len"),
        "seed": data.draw(st.integers(-5, 2**40), "seed"),
        "layout": data.draw(st.sampled_from(["tutorial", "native"]), "layout"),
        "shuffle": data.draw(st.sampled_from(["full", "windowed"]), "shuffle"),
    }
    before, after = data.draw(st.integers(0, 30), "before"), data.draw(st.integers(1, 5), "after")
    prefetch = data.draw(st.booleans(), "prefetch")
    with TemporaryDirectory() as folder:
        store = build_store(Path(folder) / "GoTo.zarr", make_episodes(lengths))
        whole = ExpertTrajectoryIterator(store, **kinds)
        expected = [next(whole) for _ in range(before + after)]
        world = data.draw(st.sampled_from(worlds), "world")
        ranks = [
            ExpertTrajectoryIterator(store, **kinds, rank=rank, world=world, prefetch=prefetch)
            for rank in range(world)
        ]
        for batch in expected[:before]:
            assert equal(batch, joined([next(rank) for rank in ranks]))
        states = [json.loads(json.dumps(rank.state())) for rank in ranks]
        assert all(state == states[0] for state in states)
        world = data.draw(st.sampled_from(worlds), "other world")
        resumed = [
            ExpertTrajectoryIterator(store, **kinds, rank=rank, world=world, prefetch=prefetch)
            for rank in range(world)
        ]
        next(resumed[0])
        for rank in resumed:
            rank.load_state(states[0])
        for batch in expected[before:]:
            assert equal(batch, joined([next(rank) for rank in resumed]))
        assert resumed[-1].state() == whole.state()


def joined(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches], dim=1) for name in batches[0]}


@given(
    lengths=lengths_of_stores,
    seed=st.integers(0, 100),
    rollout_len=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=20)
def test_every_episode_is_played_once_an_epoch(
    lengths: list[int], seed: int, rollout_len: int, data: st.DataObject
) -> None:
    rollouts = data.draw(st.integers(1, len(lengths)), "rollouts")
    shuffle: Any = data.draw(st.sampled_from(["full", "windowed"]), "shuffle")
    with TemporaryDirectory() as folder:
        # the view of every step spells the number of its episode, its place and "last or not"
        episodes = make_episodes(lengths)
        offset = episodes.offset
        for number, length in enumerate(lengths):
            for step in range(length):
                episodes.view[offset[number] + step, 0, :3] = number, step, step == length - 1
        store = build_store(Path(folder) / "GoTo.zarr", episodes)
        batches = ExpertTrajectoryIterator(
            store,
            rollouts=rollouts,
            rollout_len=rollout_len,
            seed=seed,
            layout="native",
            shuffle=shuffle,
        )
        views = []
        while batches.epoch < 2:
            views.append(next(batches)["cells"][:, :, 0, :3].clone())
        stream = torch.cat(views).numpy()  # [time, B, 3]
    epochs: list[list[int]] = [[], []]
    for rollout in range(rollouts):
        ends = stream[:, rollout][stream[:, rollout, 2] == 1]
        share = len(range(rollout, len(lengths), rollouts))
        for epoch in range(2):
            epochs[epoch] += ends[epoch * share : (epoch + 1) * share, 0].tolist()
        assert stream[0, rollout, 1] == 0
    assert [sorted(played) for played in epochs] == [list(range(len(lengths)))] * 2


def test_a_stream_resumes_in_another_process(make_store: MakeStore) -> None:
    store = make_store(lengths=LENGTHS)
    here = ExpertTrajectoryIterator(store, rollouts=4, rollout_len=3, seed=7, layout="native")
    for _ in range(5):
        next(here)
    program = (
        "import json, sys\n"
        "from demotools.store.reading import open_store\n"
        "from trainer.data.iterator import ExpertTrajectoryIterator\n"
        "there = ExpertTrajectoryIterator(open_store(sys.argv[1]), rollouts=4, rollout_len=3,\n"
        "    seed=7, layout='native', prefetch=True)\n"
        "there.load_state(json.loads(sys.argv[2]))\n"
        "print(json.dumps({name: a.tolist() for name, a in next(there).items()}))\n"
    )
    state = json.dumps(here.state())
    output = subprocess.run(
        [sys.executable, "-c", program, str(store.path), state],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(output) == {name: a.tolist() for name, a in next(here).items()}


def test_a_batch_that_is_kept_is_never_overwritten(make_store: MakeStore) -> None:
    store = make_store(lengths=LENGTHS)
    settings: dict[str, Any] = {"rollouts": 4, "rollout_len": 3, "prefetch": True}
    for layout in ("tutorial", "native"):
        kept = list(zip(range(20), ExpertTrajectoryIterator(store, layout=layout, **settings)))  # noqa: B905
        views = [(number, batch["masks"][1:, 0]) for number, batch in kept]
        again = ExpertTrajectoryIterator(store, layout=layout, **settings)
        copies = [{name: a.clone() for name, a in next(again).items()} for _ in range(20)]
        assert all(equal(batch, copies[number]) for number, batch in kept)
        del kept
        gc.collect()
        for _ in range(20):
            next(again)
        assert all(torch.equal(view, copies[number]["masks"][1:, 0]) for number, view in views)


def test_memory_is_used_again_once_nothing_refers_to_it() -> None:
    buffers = Buffers(pinned=False)
    shape = (1 << 26,)  # so large that the system would give new memory, full of zeros
    first = buffers.lease(shape, torch.uint8)
    first[:] = 7
    view = first[5:9]
    del first
    assert buffers.lease(shape, torch.uint8)[5] == 0
    assert view.tolist() == [7, 7, 7, 7]
    del view
    leased = [buffers.lease(shape, torch.uint8) for _ in range(2)]
    assert sorted(int(memory[5]) for memory in leased) == [0, 7]


def test_a_store_of_several_chunk_files_is_read_as_one_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # small chunks, so that a test need not write two million steps
    monkeypatch.setattr("demotools.store.building._CHUNK_STEPS", 4096)
    store = build_store(tmp_path / "GoTo.zarr", make_episodes([50] * 300))
    assert len(store.view.chunks) == 4
    settings: dict[str, Any] = {"rollouts": 30, "rollout_len": 40, "layout": "native"}
    pieces = [chunk.reshape(len(chunk), -1) for chunk in store.view.chunks]
    [whole] = mapped_column(pieces, [0, 4096, 8192, 12288]).pieces
    assert np.array_equal(whole.reshape(-1, 7, 7), store.view.span(0, store.steps))
    mapped = ExpertTrajectoryIterator(store, residence="map", **settings)
    copied = ExpertTrajectoryIterator(store, residence="device", **settings)
    # the system refuses to map them as one
    monkeypatch.setattr("trainer.data.batches.sys.platform", "somewhere")
    pieced = ExpertTrajectoryIterator(store, residence="map", **settings)
    monkeypatch.undo()
    queues = [reference_queue(store, b, 30, 0) for b in range(30)]
    while mapped.epoch < 1:
        rows = np.array([[next(queue) for queue in queues] for _ in range(40)])
        batch = next(mapped)
        assert (batch["cells"].numpy() == store.view.take(rows)).all()
        assert (batch["expert_action"].numpy() == store.action.take(rows)).all()
        assert (batch["masks"].numpy() == store.mask.take(rows)).all()
        assert equal(batch, next(copied))
        assert equal(batch, next(pieced))


def test_several_stores_are_mixed_in_proportion_with_one_token_table(tmp_path: Path) -> None:
    long, short = make_episodes([5] * 30, seed=1), make_episodes([2] * 20, seed=2)
    long.view[:] = 1
    short.view[:] = 2
    short.mission[:] = ["put the grey key next to the red door then go to a lamp"] * 20
    stores = [build_store(tmp_path / "A.zarr", long), build_store(tmp_path / "B.zarr", short)]
    batches = ExpertTrajectoryIterator(
        [Source(stores[0], 3), Source(stores[1], 1)], rollouts=8, rollout_len=6, layout="native"
    )
    for _ in range(10):
        batch = next(batches)
        assert (batch["cells"].numpy()[:, :, 0, 0] == [1] * 6 + [2] * 2).all()
        tokens = batches.mission_tokens[batch["mission"].long()]
        words = np.array(["", *batches.vocabulary])[tokens[0, 7].numpy()].tolist()
        assert " ".join(words) == "put the grey key next to the red door then go to a lamp"
    assert batches.passes_of_stores == {"A": 10 * 36 / 150, "B": 10 * 12 / 40}
    assert batches.passes == 480 / 190
    state = json.loads(json.dumps(batches.state()))
    ranks = [
        ExpertTrajectoryIterator(
            [Source(stores[0], 3), Source(stores[1], 1)],
            rollouts=8,
            rollout_len=6,
            layout="native",
            rank=rank,
            world=4,
        )
        for rank in range(4)
    ]
    for rank in ranks:
        rank.load_state(state)
    assert equal(next(batches), joined([next(rank) for rank in ranks]))


def test_only_the_episodes_that_fit_the_filter_are_played(make_store: MakeStore) -> None:
    store = make_store(lengths=[1, 2, 3, 4, 5, 6] * 5)
    chosen = store.filter(mission="red|green", min_length=3, max_length=5)
    batches = ExpertTrajectoryIterator(chosen, rollouts=2, rollout_len=4, layout="native")
    played = set()
    while batches.epoch < 1:
        played |= set(next(batches)["mission"].reshape(-1).tolist())
    texts = {store.mission_text[row] for row in played}
    assert texts == {"go to the red ball", "go to a green key"}
    assert batches.steps == chosen.steps < store.steps


def test_the_stream_ends_at_the_number_of_steps_asked_for(make_store: MakeStore) -> None:
    store = make_store(lengths=LENGTHS)
    for prefetch in (False, True):
        batches = ExpertTrajectoryIterator(
            store, rollouts=4, rollout_len=3, max_steps=40, prefetch=prefetch
        )
        assert len(batches) == 4
        assert sum(1 for _ in batches) == 4
        assert batches.demo_steps == 48
        state = batches.state()
        batches.load_state({**state, "batches": 3})
        assert sum(1 for _ in batches) == 1
    with pytest.raises(TypeError, match="endless"):
        len(ExpertTrajectoryIterator(store, rollouts=4, rollout_len=3))


@pytest.mark.parametrize("prefetch", [False, True])
def test_after_close_it_says_so_and_another_goes_on(prefetch: bool, make_store: MakeStore) -> None:
    store = make_store(lengths=LENGTHS)
    settings: dict[str, Any] = {"rollouts": 4, "rollout_len": 3, "prefetch": prefetch}
    closed, again = (ExpertTrajectoryIterator(store, **settings) for _ in range(2))
    next(closed)
    for _ in range(2):
        closed.close()
        with pytest.raises(SettingsError, match="is closed") as refused:
            next(closed)
    assert refused.value.path == str(store.path) and "load_state" in refused.value.fix
    again.load_state(closed.state())
    fresh = ExpertTrajectoryIterator(store, **settings)
    next(fresh)
    assert equal(next(again), next(fresh))


def test_neither_global_random_state_nor_disk_is_touched(make_store: MakeStore) -> None:
    store = make_store(lengths=LENGTHS)
    before = [(file, file.stat().st_mtime_ns) for file in sorted(store.path.parent.rglob("*"))]
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    batches = ExpertTrajectoryIterator(store, rollouts=4, rollout_len=3, shuffle="windowed")
    for _ in range(20):
        next(batches)
    after = [(file, file.stat().st_mtime_ns) for file in sorted(store.path.parent.rglob("*"))]
    assert before == after
    assert str(numpy_state) == str(np.random.get_state())
    assert torch.equal(torch_state, torch.get_rng_state())


def image_store(path: Path) -> Store:
    episodes = make_episodes([3, 2, 4])
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    return build_store(path, type(episodes)(**{**episodes.__dict__, "view": pixels}))


def test_a_store_of_images_plays_in_the_tutorial_layout(tmp_path: Path) -> None:
    store = image_store(tmp_path / "Pixels.zarr")
    batches = ExpertTrajectoryIterator(store, rollouts=2, rollout_len=4, seed=1)
    queues = [reference_queue(store, b, 2, 1) for b in range(2)]
    for _ in range(5):
        rows = np.array([[next(queue) for queue in queues] for _ in range(4)])
        assert (next(batches)["minigrid_ego_image"].numpy() == store.view.take(rows)).all()


def test_bad_settings_are_refused_in_three_parts(make_store: MakeStore, tmp_path: Path) -> None:
    store, other = make_store(lengths=LENGTHS), make_store(lengths=[2, 2], name="Other")
    images = image_store(tmp_path / "Pixels.zarr")
    refused: list[tuple[str, Any, dict[str, Any]]] = [
        ("cannot be divided among 3 processes", store, {"rollouts": 4, "world": 3}),
        ("this is rank 2", store, {"rollouts": 4, "world": 2, "rank": 2}),
        ("there are 12 rollouts, but only 11 episodes", store, {"rollouts": 12}),
        ("0 rollouts", store, {"rollouts": 0}),
        ("the store has images", images, {"rollouts": 2, "layout": "native"}),
        ("no store to play", [], {"rollouts": 2}),
        ("no episode of this store is selected", Source(store.select([])), {"rollouts": 2}),
        ("a proportion is 0", [Source(store, 0.0), other], {"rollouts": 4}),
        ("too few for 2 stores", [Source(store, 100.0), other], {"rollouts": 4}),
        ("have shape (8, 8, 3)", [store, images], {"rollouts": 4}),
        ("but only 2 episodes", [store, other], {"rollouts": 8}),
    ]
    for what, stores, changed in refused:
        with pytest.raises(SettingsError) as caught:
            ExpertTrajectoryIterator(stores, rollout_len=3, **changed)
        assert what in caught.value.what
        assert caught.value.path
        assert caught.value.fix


def test_stores_that_number_their_words_differently_are_not_mixed(tmp_path: Path) -> None:
    one, two = make_episodes([2, 2]), make_episodes([2, 2])
    one.mission[:] = ["go to the lamp", "go to the lamp"]
    two.mission[:] = ["go to the chair", "go to the chair"]
    stores = [build_store(tmp_path / "A.zarr", one), build_store(tmp_path / "B.zarr", two)]
    with pytest.raises(SettingsError, match="number their words differently"):
        ExpertTrajectoryIterator(stores, rollouts=2, rollout_len=3)


def test_a_state_of_something_else_is_refused_and_the_stream_stays_where_it_is(
    make_store: MakeStore, tmp_path: Path
) -> None:
    store, other = make_store(lengths=LENGTHS), make_store(LENGTHS, seed=1, name="Other")
    words = make_episodes(LENGTHS)
    words.mission[0] = "go to the lamp"
    with_lamp = build_store(tmp_path / "Lamp.zarr", words)
    settings: dict[str, Any] = {"rollouts": 4, "rollout_len": 3, "seed": 7}
    batches = ExpertTrajectoryIterator(store, **settings)
    next(batches)
    state = batches.state()
    some = store[:9]
    others: list[tuple[Any, dict[str, Any]]] = [
        (other, {}),
        (with_lamp, {}),
        (some, {}),
        ([store, other], {}),
        (store, {"seed": 8}),
        (store, {"rollouts": 2}),
        (store, {"rollout_len": 4}),
    ]
    for stores, changed in others:
        with pytest.raises(CheckpointError, match="saved rollouts differ in"):
            ExpertTrajectoryIterator(stores, **{**settings, **changed}).load_state(state)
    cursors = state["cursors"]
    damages: list[dict[str, Any]] = [
        {"batches": "many"},
        {"batches": -1},
        {"cursors": {}},
        {"cursors": {**cursors, "epoch": [0, 0]}},
        {"cursors": {**cursors, "position": [99] * 4}},
        {"cursors": {**cursors, "step": [99] * 4}},
        {"cursors": {**cursors, "step": [-1] * 4}},
    ]
    for damage in damages:
        with pytest.raises(CheckpointError, match="damaged"):
            batches.load_state({**state, **damage})
    assert batches.state() == state


def test_a_store_replaced_under_the_iterator_is_refused_at_the_next_open(
    make_store: MakeStore,
) -> None:
    store = make_store(lengths=LENGTHS)
    batches = ExpertTrajectoryIterator(store, rollouts=4, rollout_len=3)
    first, state = next(batches), batches.state()
    make_store(LENGTHS, seed=1)
    again = ExpertTrajectoryIterator(open_store(store.path), rollouts=4, rollout_len=3)
    assert not equal(first, next(again))
    with pytest.raises(CheckpointError, match="differ in stores"):
        again.load_state(state)
    batches.load_state({**state, "batches": 0})  # the old bytes are still mapped
    next(batches)


def test_a_chunk_file_that_is_missing_or_short_is_refused(make_store: MakeStore) -> None:
    store = make_store(lengths=LENGTHS)
    chunk = store.path / "cells/c/0/0/0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-7])
    with pytest.raises(StoreError, match="bytes long instead of"):
        open_store(store.path)
    chunk.unlink()
    with pytest.raises(DemotoolsError, match="chunk file cells/c/0/0/0 is missing"):
        open_store(store.path)


def test_one_pass_counts_every_step_exactly_once(make_store: MakeStore) -> None:
    store = make_store(lengths=LENGTHS)
    for rollouts, rollout_len in ((1, 4), (4, 3), (4, 50), (11, 2)):
        batches = ExpertTrajectoryIterator(
            store, rollouts=rollouts, rollout_len=rollout_len, layout="native"
        )
        next(batches)
        counted = [batch["cells"][counts] for batch, counts in batches.one_pass()]
        ours = torch.cat(counted).reshape(store.steps, -1).numpy()
        stored = store.view.chunks[0].reshape(store.steps, -1)
        assert sorted(ours.tolist()) == sorted(stored.tolist())


def test_cross_entropy_over_one_pass_is_the_mean_over_all_steps(make_store: MakeStore) -> None:
    store = make_store(lengths=LENGTHS)
    table = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))  # logits by direction
    total, steps = torch.zeros(()), 0
    batches = ExpertTrajectoryIterator(store, rollouts=3, rollout_len=4, layout="native")
    for batch, counts in batches.one_pass():
        loss = torch.nn.functional.cross_entropy(
            table[batch["direction"].long()][counts],
            batch["expert_action"][counts].long(),
            reduction="sum",
        )
        total, steps = total + loss, steps + int(counts.sum())
    direction = torch.from_numpy(store.direction.chunks[0].astype(np.int64))
    action = torch.from_numpy(store.action.chunks[0].astype(np.int64))
    expected = torch.nn.functional.cross_entropy(table[direction], action)
    assert steps == store.steps
    torch.testing.assert_close(total / steps, expected)


@pytest.mark.parametrize("shuffle", ["full", "windowed"])
def test_an_open_store_plays_what_was_opened_though_another_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: Any
) -> None:
    monkeypatch.setattr("demotools.store.building._CHUNK_STEPS", 4096)
    store = build_store(tmp_path / "GoTo.zarr", make_episodes([50] * 300))
    shutil.rmtree(store.path)
    build_store(store.path, make_episodes([50] * 300, seed=1))
    batches = ExpertTrajectoryIterator(
        store, rollouts=30, rollout_len=40, layout="native", shuffle=shuffle
    )
    queues = [reference_queue(store, b, 30, 0) for b in range(30)]
    for _ in range(10):
        rows = np.array([[next(queue) for queue in queues] for _ in range(40)])
        assert np.array_equal(next(batches)["cells"].numpy(), store.view.take(rows))


def test_what_was_taken_and_the_subgoals_come_with_a_native_batch(tmp_path: Path) -> None:
    plain = make_episodes([3, 5, 2, 7] * 8)
    optional = {"taken": (plain.action + 1) % 7, "subgoal": plain.action * 2}
    episodes, texts = replace(plain, optional=optional), [f"text {n}" for n in range(13)]
    noisy = build_store(tmp_path / "Noisy.zarr", episodes, subgoals=texts)
    batch = next(ExpertTrajectoryIterator(noisy, rollouts=4, rollout_len=20, layout="native"))
    action = batch["expert_action"].numpy()
    assert np.array_equal(batch["taken"].numpy(), (action + 1) % 7)
    assert np.array_equal(batch["subgoal"].numpy(), action * 2)
    mirrored = Augmenter(["mirror"], noisy.attributes.vocabulary, seed=3)(
        batch, torch.from_numpy(noisy.mission_tokens.astype(np.int64)), np.zeros(4, np.int64)
    )
    changed = mirrored["expert_action"].numpy() != action
    assert changed.any()
    both = changed & (action < 1)  # a left that became a right: what was taken is right, now left
    assert (batch["taken"].numpy()[both] == 1).all()
    assert (mirrored["taken"].numpy()[both] == 0).all()
    assert torch.equal(mirrored["subgoal"], batch["subgoal"])
    other = build_store(tmp_path / "Plain.zarr", plain)
    both_stores = ExpertTrajectoryIterator([noisy, other], rollouts=4, rollout_len=20)
    assert not {"taken", "subgoal"} & next(both_stores).keys()


def test_a_store_is_named_as_in_the_commands_or_refused_with_what_to_give(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(LENGTHS)
    monkeypatch.setenv("DEMOTOOLS_DATA", str(store.path.parent))
    expected = next(ExpertTrajectoryIterator(store, rollouts=2, rollout_len=4))
    for given_store in ("GoToLocal", store.path, [str(store.path)], Source("GoToLocal")):  # type: ignore[arg-type]
        rollouts = ExpertTrajectoryIterator(given_store, rollouts=2, rollout_len=4)
        assert equal(next(rollouts), expected)
    assert repr(rollouts) == "<rollouts of GoToLocal: 2 rollouts x 4 steps, 1 batch so far>"
    with pytest.raises(StoreError, match="there is no such"):
        ExpertTrajectoryIterator("GoToLokal", rollouts=2, rollout_len=4)
    for wrong in (None, 5, [store, 7], store[0]):
        with pytest.raises(SettingsError, match="not a store") as refusal:
            ExpertTrajectoryIterator(wrong, rollouts=2, rollout_len=4)  # type: ignore[arg-type]
        assert "demotools.open" in refusal.value.fix
