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
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    store = make_store(lengths=[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
    changes = ("stages.0.off_policy.rollouts=3", "stages.0.off_policy.rollout_len=4")
    run = new(
        *(tmp_path / "run", "bc_small_cpu", {"GoToLocal": store}, "model.type=small"),
        *("stages.0.off_policy.store=GoToLocal", *changes),
    )
    stage = run.settings.stages[0]
    assert stage.off_policy is not None
    assert stage.off_policy.augment
    plain, ahead = (StoreBatches(run, stage, prefetch=one) for one in (False, True))
    for _ in range(5):
        assert_same(next(ahead), next(plain))
    assert_same(ahead.state(), plain.state())
    halfway = ahead.state()
    following = [next(plain) for _ in range(3)]
    for again in (ahead, StoreBatches(run, stage, prefetch=True)):
        next(again)
        again.load_state(halfway)
        for batch in following:
            assert_same(next(again), batch)
        assert_same(again.state(), plain.state())


def assert_same(mine: Any, theirs: Any) -> None:
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert_same(value, theirs[name])
    elif isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs)
    else:
        assert mine == theirs


@pytest.mark.parametrize("prefetch", [False, True])
def test_the_threads_of_a_stages_batches_end_with_it(
    prefetch: bool, make_store: Callable[..., Store], tmp_path: Path
) -> None:
    store = make_store(lengths=[3, 1, 4, 1, 5, 9])
    run = new(
        *(tmp_path / "run", "bc_small_cpu", {"GoToLocal": store}, "model.type=small"),
        *("stages.0.off_policy.store=GoToLocal", "stages.0.off_policy.rollouts=2"),
        "stages.0.off_policy.shuffle='windowed'",  # the iterator has a thread of its own
    )
    batches = StoreBatches(run, run.settings.stages[0], prefetch=prefetch)
    with pytest.raises(RuntimeError, match="out of batches"), closing(batches):
        next(batches)
        assert preparing()
        raise RuntimeError("out of batches")
    assert not preparing()


def preparing() -> list[str]:
    """The threads that prepare batches."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("rollouts", "augmented"))]
