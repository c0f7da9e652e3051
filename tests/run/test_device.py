from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from demotools.babyai.vocabulary import WORDS
from demotools.store.reading import Store
from trainer.data.augment import Augmenter
from trainer.data.iterator import ExpertTrajectoryIterator
from trainer.run.state import Run, StoreBatches, new_run
from trainer.settings.models import read_settings

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ("model.embedding=8", "model.features=16", "model.memory=16", "model.instruction=16")


def new(tmp_path: Path, recipe: str, stores: dict[str, Store], *overrides: str) -> Run:
    changes = ["run.device=cpu", "evaluation=", "run.precision=float32", *SIZES, *overrides]
    settings = read_settings(recipe, changes, tiny=True)
    tmp_path.mkdir()
    return new_run(settings, stores, WORDS, tmp_path)


def test_augmented_batches_prepared_ahead_are_the_same_and_so_is_their_state(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])

    def begun(*, prefetch: bool) -> ExpertTrajectoryIterator:
        augmenter = Augmenter(["recolor", "mirror"], store.attributes.vocabulary, seed=3)
        kinds: dict[str, Any] = {"layout": "native", "prefetch": prefetch}
        return ExpertTrajectoryIterator(
            store, rollouts=3, rollout_len=4, augmenter=augmenter, **kinds
        )

    plain, ahead = begun(prefetch=False), begun(prefetch=True)
    with closing(ahead), closing(begun(prefetch=True)) as resumed:
        for _ in range(5):
            assert_same(next(ahead), next(plain))
        assert_same(ahead.state(), plain.state())
        halfway = ahead.state()
        following = [next(plain) for _ in range(3)]
        for again in (ahead, resumed):
            next(again)
            again.load_state(halfway)
            for batch in following:
                assert_same(next(again), batch)
            assert_same(again.state(), plain.state())


def test_a_stage_augments_as_its_recipe_says(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    store = make_store(lengths=[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
    changes = ("stages.0.off_policy.rollouts=3", "stages.0.off_policy.rollout_len=4")
    run = new(
        *(tmp_path / "run", "bc_small_cpu", {"GoToLocal": store}, "model.type=small"),
        *("stages.0.off_policy.store=GoToLocal", *changes),
    )
    stage = run.settings.stages[0]
    assert stage.off_policy is not None and stage.off_policy.augment
    seed = run.settings.run.seed
    augmenter = Augmenter(stage.off_policy.augment, WORDS, seed=seed)
    batches = StoreBatches(run, stage)
    same: dict[str, Any] = {"rollouts": 3, "rollout_len": 4, "seed": seed, "layout": "native"}
    same["shuffle"] = stage.off_policy.shuffle
    expected = ExpertTrajectoryIterator(store, augmenter=augmenter, **same)
    plain = ExpertTrajectoryIterator(store, **same)
    changed = False
    with closing(batches):
        for _ in range(3):
            batch = next(batches)
            assert_same(batch, next(expected))
            changed |= not torch.equal(batch["cells"], next(plain)["cells"])
    assert changed


def assert_same(mine: Any, theirs: Any) -> None:
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert_same(value, theirs[name])
    elif isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs)
    else:
        assert mine == theirs


def test_the_thread_of_a_stages_batches_ends_with_it(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    store = make_store(lengths=[3, 1, 4, 1, 5, 9])
    run = new(
        *(tmp_path / "run", "bc_small_cpu", {"GoToLocal": store}, "model.type=small"),
        *("stages.0.off_policy.store=GoToLocal", "stages.0.off_policy.rollouts=2"),
        "stages.0.off_policy.shuffle='windowed'",  # which is read ahead
    )
    others = preparing()  # of tests before this one
    batches = StoreBatches(run, run.settings.stages[0])
    with pytest.raises(RuntimeError, match="out of batches"), closing(batches):
        next(batches)
        assert preparing() - others
        raise RuntimeError("out of batches")
    assert not preparing() - others


def preparing() -> set[threading.Thread]:
    """The threads that prepare batches."""
    return {one for one in threading.enumerate() if one.name.startswith("rollouts")}
