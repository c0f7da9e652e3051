from __future__ import annotations

import inspect
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from demotools.babyai.levels import Symmetry
from demotools.babyai.vocabulary import WORDS
from demotools.errors import SettingsError, StoreError
from demotools.store.reading import Store
from tests.run.test_team import run_together
from trainer.data.augment import Augmenter
from trainer.data.dataset import RolloutDataset
from trainer.data.iterator import ExpertTrajectoryIterator

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
MakeStore = Callable[..., Store]
SETTINGS: dict[str, Any] = {"rollouts": 4, "rollout_len": 3, "seed": 7, "layout": "native"}


@pytest.mark.parametrize(
    ("workers", "start", "symmetries"),
    [
        (0, None, ()),
        (1, "fork", ()),
        (2, "fork", ("recolor", "mirror")),
        pytest.param(2, "spawn", ("mirror",), marks=pytest.mark.slow),
    ],
)
def test_a_data_loader_gives_the_same_stream_for_any_number_of_workers(
    make_store: MakeStore, workers: int, start: str | None, symmetries: tuple[Symmetry, ...]
) -> None:
    store = make_store(lengths=LENGTHS)
    augmenter = Augmenter(symmetries, WORDS, seed=1) if symmetries else None
    settings: dict[str, Any] = {**SETTINGS, "max_steps": 7 * 12, "augmenter": augmenter}
    expected = list(ExpertTrajectoryIterator(store, **settings))
    loader = DataLoader(
        RolloutDataset(store, **settings),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=start,
    )
    assert len(loader) == 7
    got = list(loader)
    assert len(got) == 7
    for ours, theirs in zip(expected, got, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_dataset_resumes_with_and_without_workers(make_store: MakeStore) -> None:
    store = make_store(lengths=LENGTHS)
    whole = list(ExpertTrajectoryIterator(store, **SETTINGS, max_steps=9 * 12))
    first = RolloutDataset(store, **SETTINGS, max_steps=9 * 12)
    batches = iter(first)
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(first.state_dict()))
    assert first.passes == 36 / sum(LENGTHS)
    for workers in (0, 2):
        second = RolloutDataset(store, **SETTINGS, max_steps=9 * 12)
        second.load_state_dict(state)
        got = list(DataLoader(second, batch_size=None, num_workers=workers))
        assert len(got) == 6
        for ours, theirs in zip(whole[3:], got, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


_IN_A_GROUP = """
import json, sys
import torch.distributed as dist
from torch.utils.data import DataLoader
from trainer.data.dataset import RolloutDataset

def main(store, settings, late, start):
    if not late:
        dist.init_process_group("gloo")
    dataset = RolloutDataset(store, **settings)
    if late:
        next(iter(dataset))
        dist.init_process_group("gloo")
    workers = {"num_workers": 2, "multiprocessing_context": start} if start else {}
    got = [batch["expert_action"].tolist() for batch in DataLoader(dataset, None, **workers)]
    whole = next(iter(RolloutDataset(store, **settings, rank=0, world=1)))["expert_action"].shape
    gathered = [None, None]
    dist.all_gather_object(gathered, got)
    if dist.get_rank() == 0:
        print(json.dumps({"got": gathered, "whole": whole}))
    dist.destroy_process_group()

if __name__ == "__main__":
    main(*map(json.loads, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("late", "start"),
    [
        (False, None),
        pytest.param(False, "fork", marks=pytest.mark.slow),
        pytest.param(True, None, marks=pytest.mark.slow),
        pytest.param(True, "fork", marks=pytest.mark.slow),
        pytest.param(True, "spawn", marks=pytest.mark.slow),
    ],
)
def test_each_process_of_a_group_gets_its_rollouts_unless_told_which(
    make_store: MakeStore, tmp_path: Path, late: bool, start: str | None
) -> None:
    """The processes join the group before they make the dataset, or after a first batch."""
    store = make_store(lengths=LENGTHS)
    settings = {**SETTINGS, "max_steps": 5 * 12}
    program = tmp_path / "program.py"
    program.write_text(_IN_A_GROUP, "utf-8")
    arguments = [json.dumps(one) for one in (str(store.path), settings, late, start)]
    with (tmp_path / "said").open("w+b") as said:
        run_together([str(program), *arguments], 2, stdout=said)
        said.seek(0)
        found = json.loads(said.read())
    alone = [batch["expert_action"] for batch in ExpertTrajectoryIterator(store, **settings)]
    assert found["whole"] == [3, 4]
    for rank, share in enumerate((slice(0, 2), slice(2, 4))):
        assert found["got"][rank] == [batch[:, share].tolist() for batch in alone[late:]]


def test_a_dataset_travels_to_another_process_and_goes_on_there(make_store: MakeStore) -> None:
    here = RolloutDataset(make_store(lengths=LENGTHS), **SETTINGS)
    next(iter(here))
    there = pickle.loads(pickle.dumps(here))
    ours, theirs = next(iter(here)), next(iter(there))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("given", [{}, {"batch_size": 4}, {"batch_size": 4, "num_workers": 1}])
def test_a_data_loader_that_would_stack_whole_batches_is_refused(
    make_store: MakeStore, given: dict[str, Any]
) -> None:
    dataset = RolloutDataset(make_store(lengths=LENGTHS), **SETTINGS)
    # from a worker torch tells every error of more than one part as a RuntimeError with its text
    with pytest.raises((SettingsError, RuntimeError), match="pass batch_size=None"):
        next(iter(DataLoader(dataset, **given)))
    assert next(iter(DataLoader(dataset, batch_size=None)))["cells"].shape == (3, 4, 7, 7)


@pytest.mark.skipif(
    "in_order" not in inspect.signature(DataLoader).parameters, reason="an older torch"
)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_data_loader_that_keeps_no_order_is_refused_if_it_has_workers(
    make_store: MakeStore, start: str
) -> None:
    dataset = RolloutDataset(make_store(lengths=LENGTHS), **SETTINGS)
    assert next(iter(DataLoader(dataset, batch_size=None, in_order=False)))
    several: Any = {"num_workers": 2, "multiprocessing_context": start}
    with pytest.raises((SettingsError, RuntimeError), match="leave in_order at True"):
        next(iter(DataLoader(dataset, batch_size=None, in_order=False, **several)))


def test_workers_that_stay_refuse_a_second_iteration_which_would_lose_batches(
    make_store: MakeStore,
) -> None:
    dataset = RolloutDataset(make_store(lengths=LENGTHS), **SETTINGS)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="prefetched batches, which a second iteration"):
        next(iter(loader))


def test_new_workers_warn_that_they_give_the_same_batches_again(make_store: MakeStore) -> None:
    dataset = RolloutDataset(make_store(lengths=LENGTHS), **SETTINGS, max_steps=12)
    loader = DataLoader(dataset, batch_size=None, num_workers=1)
    assert len(list(loader)) == 1
    # which tests take for an error, as all warnings
    with pytest.raises(UserWarning, match="repeats the batches of the first"):
        list(loader)
    dataset.load_state_dict(dataset.state_dict())
    assert len(list(loader)) == 1


def test_a_dataset_refuses_bad_settings_before_any_worker_starts(make_store: MakeStore) -> None:
    with pytest.raises(SettingsError):
        RolloutDataset(make_store(lengths=[2, 2]), rollouts=3, rollout_len=3)


def test_a_pickled_store_is_opened_again_by_its_path(make_store: MakeStore) -> None:
    store = make_store(lengths=LENGTHS)
    content = pickle.dumps(store)
    assert len(content) < 1000
    assert (pickle.loads(content).view.chunks[0] == store.view.chunks[0]).all()
    make_store(LENGTHS, seed=1)
    with pytest.raises(StoreError, match="replaced while"):
        pickle.loads(content)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("settings", [{"prefetch": True}, {"shuffle": "windowed"}])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_dataset_that_was_iterated_here_goes_on_in_forked_workers(
    make_store: MakeStore, settings: dict[str, Any]
) -> None:
    store = make_store(lengths=LENGTHS)

    def dataset() -> RolloutDataset:
        return RolloutDataset(store, **SETTINGS, max_steps=7 * 12, residence="map", **settings)

    wanted = [batch["expert_action"].tolist() for batch in dataset()]
    forked = dataset()
    first = next(iter(forked))["expert_action"].tolist()
    loader = DataLoader(forked, batch_size=None, num_workers=2, multiprocessing_context="fork")
    rest = [batch["expert_action"].tolist() for batch in loader]
    assert [first, *rest] == wanted
