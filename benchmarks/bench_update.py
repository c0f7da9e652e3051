"""How fast is a whole update (network, loss, backward), against everything step by step with masks?

The batch is of episodes as long as GoToLocal's (geometric, mean 5.3 steps); the reference is the
definition that the tests hold the networks against: each step on its own, nothing shared. In
turns within one run; median of several updates and their spread. The processor time is that of all
threads; on a busy machine its ratio says more than that of the clock.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from tests.learning import test_big, test_film, test_small
from tests.learning.test_networks import WORDS, random_batch
from trainer.batch import Batch
from trainer.learning.building import NETWORKS
from trainer.learning.losses import ExpertCrossEntropy, LossStep
from trainer.learning.networks.big import BigNetwork
from trainer.learning.networks.film import FilmNetwork
from trainer.learning.networks.small import SmallNetwork

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
        logits = test_big.by_steps(network, batch, network.initial_memory(rollouts))[0]
    elif isinstance(network, FilmNetwork):
        logits = test_film.by_steps(network, batch, network.initial_memory(rollouts))[0]
    else:
        assert isinstance(network, SmallNetwork)
        logits = test_small.by_steps(network, batch, network.initial_memory(rollouts))[0]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=list(NETWORKS), default="small")
    parser.add_argument("--shape", type=int, nargs=2, default=[128, 128], metavar=("T", "B"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="measure ours in it as well")
    parser.add_argument("--compile", action="store_true", help="measure ours compiled as well")
    options = parser.parse_args()
    torch.manual_seed(0)
    kind = NETWORKS[options.network]
    network = kind(WORDS).to(options.device)
    T, B = options.shape
    batch = batch_of(T, B, options.device)
    ways: dict[str, tuple[Step, nn.Module]] = {
        "step by step": (plainly, network),
        "ours": (ours(False), network),
    }
    if options.bfloat16:
        ways["ours, bfloat16"] = (ours(True), network)
    if options.compile:
        compiled = kind(WORDS).to(options.device)
        for part in convolutions(compiled):
            part.compile()
        ways["ours, compiled"] = (ours(False), compiled)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    first: dict[str, tuple[float, float]] = {}
    for number in range(options.rounds + 1):
        for name, (step, network_of_way) in ways.items():
            elapsed = seconds(step, network_of_way, batch)
            if number:
                times[name].append(elapsed)
            else:  # to warm up, and to compile
                first[name] = elapsed
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{options.network} on {options.device}, T = {T}, B = {B}, median of {options.rounds}")
    print(f"largest resident memory so far: {resident_megabytes():,.0f} MB")
    plain, plain_worked = (
        statistics.median(column) for column in zip(*times["step by step"], strict=True)
    )
    for name, pairs in times.items():
        values, worked = zip(*pairs, strict=True)
        middle, of_processors = statistics.median(values), statistics.median(worked)
        print(
            f"{name}: {middle:.3f} s ({min(values):.3f} to {max(values):.3f}), "
            f"{T * B / middle:,.0f} steps/s, {plain / middle:.1f} x; "
            f"processor time {of_processors:.3f} s, {plain_worked / of_processors:.2f} x; "
            f"the first took {first[name][0]:.1f} s"
        )


if __name__ == "__main__":
    main()
