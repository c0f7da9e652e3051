"""Stores, batches and training runs are bit for bit what they were: hashes, kept in bits.json.

    python tests/test_bits.py --write

writes the hashes anew, which is right only where a change is meant to alter bits; the log
(docs/log.md) then says which and why. Weights depend on a processor's arithmetic and on torch, so
they are compared only where a small fixed computation gives the same bits as where they were
written.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from demotools.babyai.levels import Symmetry
from demotools.cli import main as demotools_main
from demotools.pickles.writer import write_pickle
from demotools.store.reading import Episodes, open_store
from tests.conftest import build_store, make_episodes
from trainer.batch import Batch, Layout, batch_missions
from trainer.cli import main as trainer_main
from trainer.data.augment import Augmenter
from trainer.data.iterator import ExpertTrajectoryIterator
from trainer.run.checkpoint import read_checkpoint

EXPECTED = Path(__file__).with_name("bits.json")
# rollouts of 3 to 40 steps, so that batches of 16 steps hold whole episodes and parts of them
LENGTHS = [3 + number * 7 % 38 for number in range(60)]

# empty, a wall, and what is a key or a ball, by encoding
CELLS = np.array([(1, 0, 0), (2, 5, 0), (6, 0, 0), (6, 4, 0), (7, 2, 0)], dtype=np.uint8)
ENCODINGS = ("2018-08-28", "2018-11-16", "2019-01-08", "image")
RECORDED = ("GoToObj", "PutNextLocal")
LAYOUTS: tuple[Layout, ...] = ("native", "tutorial")
SEEDS = (0, 1)
# the settings beside --tiny with which each makes 20 updates
RECIPES = {
    "bc_offpolicy": ("stages.0.off_policy.updates=5",),
    "ppo": ("evaluation=", "stages.0.repeats=5", "stages.0.minibatches=1"),
    "dagger_then_ppo": (
        "evaluation=",
        "stages.1.max_env_steps=32",
    ),
}


def run(program: Any, *arguments: object) -> None:
    result = CliRunner().invoke(program, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def digest(named: Iterable[tuple[str, Any]]) -> str:
    """The hash of arrays or bytes, their names, types and shapes."""
    whole = hashlib.sha256()
    for name, value in named:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        if isinstance(value, np.ndarray):
            name = f"{name} {value.dtype.str} {value.shape}"
            value = np.ascontiguousarray(value).tobytes()
        whole.update(f"{name} {len(value)}\n".encode())
        whole.update(value)
    return whole.hexdigest()


def store_bits(path: Path) -> dict[str, str]:
    """What a store holds: its chunk files, and its arrays and missions as they are read."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    chunks = [
        (file.relative_to(path).as_posix(), file.read_bytes())
        for file in files
        if file.name != "zarr.json"
    ]
    assert chunks
    store = open_store(path)
    missions = "\n".join(store.mission_text).encode()
    columns = {
        "images": store.images(0, store.steps),
        "direction": store.direction.span(0, store.steps),
        "action": store.action.span(0, store.steps),
        "episode_offset": store.episode_offset,
        "episode_mission": store.episode_mission,
        "episode_seed": store.episode_seed,
    }
    return {"chunks": digest(chunks), "arrays": digest([*columns.items(), ("missions", missions)])}


def pickled_episodes(seed: int) -> Episodes:
    """Episodes of images with cells that every object encoding has."""
    episodes = make_episodes(LENGTHS, seed)
    images = CELLS[episodes.view % len(CELLS)]
    return replace(episodes, view=images)


def converted_bits(folder: Path, encoding: str) -> dict[str, str]:
    file = folder / "BabyAI-GoToLocal-v0.pkl"
    write_pickle(file, [pickled_episodes(seed) for seed in (1, 2)])
    options = ["--data-dir", folder, "--workers", 1, "--encoding", encoding]
    run(demotools_main, "convert", file, *options)
    return store_bits(folder / "GoToLocal.zarr")


def recorded_bits(folder: Path, level: str) -> dict[str, str]:
    options = ["--episodes", 20, "--workers", 1, "--data-dir", folder]
    run(demotools_main, "generate", level, *options)
    return store_bits(folder / f"{level}.zarr")


def named(batch: Batch, layout: Layout) -> list[tuple[str, Any]]:
    """The arrays of a batch, the expert's action of a native one under the name that was hashed."""
    names = {"expert_action": "action"} if layout == "native" else {}
    return sorted((names.get(name, name), values) for name, values in batch.items())


def batches_bits(folder: Path, layout: Layout, seed: int) -> dict[str, str]:
    store = build_store(folder / "GoToLocal.zarr", make_episodes(LENGTHS, seed=3))
    made = islice(iterator_of(store, layout, seed), 50)
    return {"batches": digest(item for batch in made for item in named(batch, layout))}


def iterator_of(
    store: Any, layout: Layout, seed: int, augmenter: Augmenter | None = None
) -> ExpertTrajectoryIterator:
    return ExpertTrajectoryIterator(
        store, rollouts=8, rollout_len=16, seed=seed, layout=layout, augmenter=augmenter
    )


def augmented_bits(folder: Path, seed: int) -> dict[str, str]:
    store = build_store(folder / "GoToLocal.zarr", make_episodes(LENGTHS, seed=3))
    symmetries: tuple[Symmetry, ...] = ("recolor", "mirror", "retype")
    augment = Augmenter(symmetries, store.attributes.vocabulary, seed=seed)
    batches = iterator_of(store, "native", seed)
    made = [*islice(iterator_of(store, "native", seed, augment), 50)]
    plain = batch_missions(next(islice(batches, 50, None)), batches.mission_tokens)
    return {"batches": digest(item for batch in (*made, plain) for item in named(batch, "native"))}


def weights_bits(folder: Path, recipe: str) -> dict[str, str]:
    options = ["--data-dir", folder, "-o", folder / "run", "-m", 1, "--quiet"]
    for setting in ("run.device=cpu", "model.type=small", *RECIPES[recipe]):
        options += ["--set", setting]
    if recipe == "bc_offpolicy":
        build_store(folder / "GoToLocal.zarr", make_episodes(LENGTHS, seed=3))
    with one_thread():
        run(trainer_main, "run", recipe, "--tiny", *options)
    saved = read_checkpoint(folder / "run" / "last.pt")
    return {"weights": digest(sorted(saved.model.items()))}


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arithmetic() -> str:
    """The bits of a small fixed computation: where they are equal, weights are to be equal."""
    generator = torch.Generator().manual_seed(0)
    lstm = torch.nn.LSTM(64, 128)
    with torch.no_grad(), one_thread():
        for parameter in lstm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        output, _ = lstm(torch.randn(32, 16, 64, generator=generator))
    weight = torch.randn(128, 48, generator=generator, requires_grad=True)
    with one_thread():
        ((output @ weight).softmax(-1) ** 2).sum().backward()
    assert weight.grad is not None
    return digest([("torch", torch.__version__.encode()), ("gradient", weight.grad)])


MAKERS: dict[str, Callable[[Path], dict[str, str]]] = {
    **{f"pickle-{encoding}": partial(converted_bits, encoding=encoding) for encoding in ENCODINGS},
    **{level: partial(recorded_bits, level=level) for level in RECORDED},
    **{
        f"{layout}-{seed}": partial(batches_bits, layout=layout, seed=seed)
        for layout in LAYOUTS
        for seed in SEEDS
    },
    **{f"augmented-{seed}": partial(augmented_bits, seed=seed) for seed in SEEDS},
}
WEIGHTS = {recipe: partial(weights_bits, recipe=recipe) for recipe in RECIPES}


def expected() -> dict[str, Any]:
    bits: dict[str, Any] = json.loads(EXPECTED.read_text("utf-8"))
    return bits


@pytest.mark.parametrize("name", MAKERS)
def test_stores_and_batches_are_bit_for_bit_what_they_were(name: str, tmp_path: Path) -> None:
    assert MAKERS[name](tmp_path) == expected()["bits"][name]


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weights_after_20_updates_are_bit_for_bit_what_they_were(
    name: str, tmp_path: Path
) -> None:
    if arithmetic() != expected()["arithmetic"]:
        pytest.skip("this machine's arithmetic or torch differs from that of the recorded weights")
    assert WEIGHTS[name](tmp_path) == expected()["weights"][name]


def test_the_recorded_hashes_are_of_all_that_is_tested() -> None:
    assert set(expected()["bits"]) == set(MAKERS)
    assert set(expected()["weights"]) == set(WEIGHTS)


def write() -> None:
    """Write bits.json anew."""

    def made(makers: Mapping[str, Callable[[Path], dict[str, str]]]) -> dict[str, dict[str, str]]:
        bits = {}
        for name, maker in makers.items():
            with tempfile.TemporaryDirectory() as folder:
                bits[name] = maker(Path(folder))
        return bits

    content = {"arithmetic": arithmetic(), "bits": made(MAKERS), "weights": made(WEIGHTS)}
    EXPECTED.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_bits.py --write")
    write()
