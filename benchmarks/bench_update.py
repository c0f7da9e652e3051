"""How fast is a whole update, and how near to what the machine multiplies?

    python -m benchmarks.bench_update                            # small, maze, big on two levels
    python -m benchmarks.bench_update small --level BossLevel --bfloat16
    python -m benchmarks.bench_update small --by-steps           # against the plain definition

The batches are of episodes that the bot plays first (or of `--data-dir`'s stores), each one new, in
the shapes of the recipes. An update is the network, its loss, backward, clipping and Adam. Its
products are counted as they are made: what a network leaves out by looking up what it has
multiplied before is not counted. The best product is the fastest of squares of 256 to 2,048 in the
same type, in the same run. Freed memory is kept, as a run keeps it. All by processor time, which a
busy machine leaves nearly as it is; medians.

`--by-steps` compares with the definition that the tests hold the networks against: each step on its
own, nothing shared, on random batches of episodes as long as GoToLocal's (geometric, mean 5.3
steps). In turns within one run, by the clock and by processor time.
"""

from __future__ import annotations

import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from demotools.babyai.levels import Symmetry
from demotools.cli import main as demotools_main
from demotools.output import counted
from demotools.store.reading import Store, open_store
from tests.learning.definitions import (
    WORDS,
    big_by_steps,
    film_by_steps,
    random_batch,
    small_by_steps,
)
from trainer.batch import Batch
from trainer.data.augment import Augmenter
from trainer.data.iterator import ExpertTrajectoryIterator
from trainer.learning.building import NETWORKS, build_optimizer, clip_gradients
from trainer.learning.losses import ExpertCrossEntropy, LossStep
from trainer.learning.networks.base import memory_of
from trainer.learning.networks.big import BigNetwork
from trainer.learning.networks.film import FilmNetwork
from trainer.learning.networks.small import SmallNetwork
from trainer.run.memory import kept_memory
from trainer.settings.models import OptimizerSettings

MEAN_RUN = 5.3
Step = Callable[[nn.Module, Batch], Tensor]


def batch_of(T: int, B: int, device: str) -> Batch:
    batch = random_batch(T, B, missions=36)
    begins = np.random.default_rng(0).random((T, B)) < 1 / MEAN_RUN
    batch["masks"] = torch.from_numpy((~begins).astype(np.uint8))
    batch["cells"] %= 24  # as many kinds of cells as a level shows
    # a mission lasts as long as its episode
    episode = torch.from_numpy(np.cumsum(begins, axis=0) * B) + torch.arange(B)
    batch["mission"] = episode % 36
    return {name: values.to(device) for name, values in batch.items()}


def ours(bfloat16: bool) -> Step:
    def loss(network: nn.Module, batch: Batch) -> Tensor:
        step = LossStep(network, bfloat16=bfloat16)
        memory: Tensor = network.initial_memory(batch["masks"].shape[1])  # type: ignore[operator]
        result: Tensor = step({"ce": ExpertCrossEntropy()}, batch, {"ce": memory})["ce"].loss
        return result

    return loss


def plainly(network: nn.Module, batch: Batch) -> Tensor:
    rollouts = batch["masks"].shape[1]
    if isinstance(network, BigNetwork):
        logits = big_by_steps(network, batch, network.initial_memory(rollouts))[0]
    elif isinstance(network, FilmNetwork):
        logits = film_by_steps(network, batch, network.initial_memory(rollouts))[0]
    else:
        assert isinstance(network, SmallNetwork)
        logits = small_by_steps(network, batch, network.initial_memory(rollouts))[0]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["expert_action"].long().flatten()
    )


def seconds(step: Step, network: nn.Module, batch: Batch) -> tuple[float, float]:
    """Of the clock, and of all processors."""
    network.zero_grad()
    start, worked = time.perf_counter(), time.process_time()
    step(network, batch).backward()  # type: ignore[no-untyped-call]
    if batch["masks"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - worked


def convolutions(network: nn.Module) -> list[nn.Module]:
    """What can be compiled once for all batches."""
    if isinstance(network, FilmNetwork):
        return [network.sight]
    if isinstance(network, BigNetwork):
        return [network.stem, *network.blocks]
    return []


def resident_megabytes() -> float:
    """The largest that this process has been."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def against_steps(name: str, shape: tuple[int, int], rounds: int, device: str, ways: Ways) -> None:
    """Print how often ours is as fast as everything step by step."""
    torch.manual_seed(0)
    network = NETWORKS[name](WORDS).to(device)
    T, B = shape
    batch = batch_of(T, B, device)
    steps: dict[str, tuple[Step, nn.Module]] = {
        "step by step": (plainly, network),
        "ours": (ours(False), network),
    }
    if ways.bfloat16:
        steps["ours, bfloat16"] = (ours(True), network)
    if ways.compiled:
        compiled = NETWORKS[name](WORDS).to(device)
        for part in convolutions(compiled):
            part.compile()
        steps["ours, compiled"] = (ours(False), compiled)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    first: dict[str, tuple[float, float]] = {}
    for number in range(rounds + 1):
        for way, (step, network_of_way) in steps.items():
            elapsed = seconds(step, network_of_way, batch)
            if number:
                times[way].append(elapsed)
            else:  # to warm up, and to compile
                first[way] = elapsed
    click.echo(f"{name} on {device}, T = {T}, B = {B}, median of {rounds}")
    click.echo(f"largest resident memory so far: {resident_megabytes():,.0f} MB")
    plain, plain_worked = (
        statistics.median(column) for column in zip(*times["step by step"], strict=True)
    )
    for way, pairs in times.items():
        values, worked = zip(*pairs, strict=True)
        middle, of_processors = statistics.median(values), statistics.median(worked)
        click.echo(
            f"{way}: {middle:.3f} s ({min(values):.3f} to {max(values):.3f}), "
            f"{T * B / middle:,.0f} steps/s, {plain / middle:.1f} x; "
            f"processor time {of_processors:.3f} s, {plain_worked / of_processors:.2f} x; "
            f"the first took {first[way][0]:.1f} s"
        )


class Ways(NamedTuple):
    """Other ways to compute ours that are measured beside it."""

    bfloat16: bool
    compiled: bool


class Played(NamedTuple):
    """The batches of a level: T x B, of so many episodes where none are recorded yet."""

    T: int
    B: int
    episodes: int
    augment: tuple[Symmetry, ...]


LEVELS = {
    "GoToLocal": Played(20, 128, 1000, ()),
    "BossLevel": Played(40, 64, 128, ("recolor", "mirror")),
}
SIZES: dict[str, dict[str, object]] = {"small": {"memory": 256}, "maze": {}, "big": {}}


def recorded(level: str, folder: Path) -> Store:
    """The store of a level in a folder; played by the bot where there is none."""
    path = folder / f"{level}.zarr"
    if not path.exists():
        episodes = str(LEVELS[level].episodes)
        options = ["--episodes", episodes, "--workers", "1", "--data-dir", str(folder)]
        demotools_main(["generate", level, *options], standalone_mode=False)
    return open_store(path)


def batches(played: Played, store: Store) -> Iterator[Batch]:
    """Batches as the training loop gets them."""
    augmenter = Augmenter(played.augment, store.attributes.vocabulary, seed=0)
    return ExpertTrajectoryIterator(
        store, rollouts=played.B, rollout_len=played.T, layout="native", augmenter=augmenter
    )


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating-point operations of matrix products and convolutions made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm"):
            left, right = args[-2:] if name != "addmm" else args[1:3]
            self.operations += 2 * left.numel() * right.shape[-1]
        elif name in ("convolution", "convolution_backward"):
            weight = args[1] if name == "convolution" else args[2]
            made = result if name == "convolution" else args[0]
            passes = 1 if name == "convolution" else 2
            self.operations += passes * 2 * made.numel() * weight[0].numel()
        return result


def best_product(dtype: torch.dtype) -> float:
    """The most floating-point operations a second of processor time of a product of squares."""
    rates = []
    for size in (256, 512, 1024, 2048):
        one, other = torch.randn(2, size, size).to(dtype)
        out = torch.empty_like(one)
        repeats = max(1, 2**28 // size**3)
        for _ in range(7):
            start = time.process_time()
            for _ in range(repeats):
                torch.mm(one, other, out=out)
            rates.append(2 * size**3 * repeats / (time.process_time() - start))
    return max(rates)


def rate_of(name: str, level: str, store: Store, rounds: int, bfloat16: bool) -> tuple[float, int]:
    """Seconds of processor time of an update, and its operations in products."""
    torch.manual_seed(0)
    network = NETWORKS[name](len(store.attributes.vocabulary), **SIZES[name])
    weights = list(network.parameters())
    optimizer = build_optimizer(OptimizerSettings(type="adam", lr=1e-3), weights)
    loss, of_losses = {"ce": ExpertCrossEntropy()}, LossStep(network, bfloat16=bfloat16)
    memory = memory_of(network, LEVELS[level].B)
    coming = batches(LEVELS[level], store)

    def update() -> float:
        nonlocal memory
        batch = next(coming)
        start = time.process_time()
        result = of_losses(loss, batch, {"ce": memory})["ce"]
        optimizer.zero_grad()
        result.loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(weights, 1.0)
        optimizer.step()
        memory = result.memory
        return time.process_time() - start

    for _ in range(4):  # maps fill, and oneDNN prepares its products
        update()
    seconds = statistics.median(update() for _ in range(rounds))
    with Products() as products:
        update()
    return seconds, products.operations


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(NETWORKS)))
@click.option("--level", "levels", type=click.Choice(list(LEVELS)), multiple=True)
@click.option("--data-dir", type=click.Path(path_type=Path), help="With stores of these levels.")
@click.option("--rounds", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--bfloat16", is_flag=True, help="In it alone; with --by-steps beside float32.")
@click.option("--by-steps", is_flag=True, help="Against everything step by step.")
@click.option("--shape", type=(int, int), default=(128, 128), help="T and B of --by-steps.")
@click.option("--device", default="cpu", help="Of --by-steps.")
@click.option("--compile", "compiled", is_flag=True, help="With --by-steps: compiled as well.")
def main(
    names: tuple[str, ...],
    levels: tuple[str, ...],
    data_dir: Path | None,
    rounds: int,
    threads: int,
    bfloat16: bool,
    by_steps: bool,
    shape: tuple[int, int],
    device: str,
    compiled: bool,
) -> None:
    """Print how fast the networks NAMES are updated."""
    click.get_current_context().with_resource(kept_memory())
    torch.set_num_threads(threads)
    click.echo(f"{platform.machine()}, torch {torch.__version__}, {counted(threads, 'thread')}")
    if by_steps:
        for name in names or ("small",):
            against_steps(name, shape, rounds, device, Ways(bfloat16, compiled))
        return
    with tempfile.TemporaryDirectory() as temporary:
        stores = {level: recorded(level, data_dir or Path(temporary)) for level in levels or LEVELS}
        for dtype in (torch.bfloat16,) if bfloat16 else (torch.float32, torch.bfloat16):
            best = best_product(dtype)
            click.echo(f"{dtype}: the best product {best / 1e9:,.0f} GFLOP/s")
            for level, store in stores.items():
                for name in names or SIZES:
                    took, operations = rate_of(name, level, store, rounds, dtype == torch.bfloat16)
                    steps = LEVELS[level].T * LEVELS[level].B
                    click.echo(
                        f"  {name}, {level} {LEVELS[level].T} x {LEVELS[level].B}: "
                        f"{steps / took:,.0f} steps/s, "
                        f"{operations / steps / 1e6:.2f} MFLOP a step, "
                        f"{operations / took / 1e9:,.0f} GFLOP/s, {operations / took / best:.0%}"
                    )


if __name__ == "__main__":
    main()
