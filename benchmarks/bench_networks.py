"""What does each network cost: weights, time forward and backward, memory, whole updates?

python benchmarks/bench_networks.py                     # every network, T = 20, B = 128
python benchmarks/bench_networks.py --write             # the same, into docs/networks.md
python benchmarks/bench_networks.py film --shape 20 32 --threads 1 --bfloat16

The batch is of GoToLocal's episodes, which the bot plays first. Forward includes the loss, an
update the optimizer too. Memory is what autograd keeps of a batch for the backward pass, the
weights not counted, each storage once. Processor time, which a busy machine leaves nearly as it is;
median of several updates.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from bench_update import LEVELS, batches, ours, recorded
from torch import Tensor, nn
from tqdm import tqdm

from demotools.babyai.vocabulary import WORDS
from demotools.output import counted
from trainer.batch import Batch
from trainer.learning.building import NETWORKS
from trainer.learning.networks.base import parameter_count
from trainer.run.memory import kept_memory

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
BEGIN = "<!-- written by benchmarks/bench_networks.py: do not edit -->\n"
END = "<!-- end of what benchmarks/bench_networks.py writes -->\n"
VOCABULARY = len(WORDS)


@dataclass(frozen=True)
class Cost:
    """What one network costs; times in seconds of processor time."""

    name: str
    parameters: int
    saved_bytes: int
    forward: float
    backward: float
    update: float
    steps: int

    def row(self) -> str:
        per_thousand = 1000 * 1000 / self.steps
        cells = (
            f"`{self.name}`",
            f"{self.parameters:,}",
            f"{self.forward * per_thousand:,.1f}",
            f"{self.backward * per_thousand:,.1f}",
            f"{self.saved_bytes / self.steps:,.0f}",
            f"{self.steps / self.update:,.0f}",
        )
        return f"| {' | '.join(cells)} |"


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps of what is computed inside, by its address."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # an address is not given out again while its storage lives

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(storage)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def measured(name: str, batch: Batch, rounds: int, bfloat16: bool) -> Cost:
    """The cost of one network on a batch."""
    torch.manual_seed(0)
    network = NETWORKS[name](VOCABULARY)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    step = ours(bfloat16)
    with kept_for_backward(network) as kept:
        step(network, batch)
    times = []
    for number in range(rounds + 1):
        optimizer.zero_grad()
        begun = time.process_time()
        loss = step(network, batch)
        forward = time.process_time()
        loss.backward()  # type: ignore[no-untyped-call]
        backward = time.process_time()
        optimizer.step()
        if number:  # the first is to warm up
            times.append((forward - begun, backward - forward, time.process_time() - begun))
    forward, backward, update = (statistics.median(column) for column in zip(*times, strict=True))
    return Cost(
        name=name,
        parameters=parameter_count(network),
        saved_bytes=sum(kept.values()),
        forward=forward,
        backward=backward,
        update=update,
        steps=batch["masks"].numel(),
    )


def table(costs: list[Cost]) -> str:
    head = (
        "| network | parameters | forward, ms/1,000 steps | backward, ms/1,000 steps "
        "| kept for backward, bytes/step | whole update, steps/s |"
    )
    return "\n".join([head, f"| --- |{' ---: |' * 5}", *(cost.row() for cost in costs)])


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(NETWORKS)))
@click.option("--shape", type=(int, int), default=(20, 128), show_default=True, metavar="T B")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Default: as many as torch takes.")
@click.option("--bfloat16", is_flag=True, help='As run.precision = "bfloat16" computes.')
@click.option("--write", is_flag=True, help="Write the table into docs/networks.md.")
def main(
    names: tuple[str, ...],
    shape: tuple[int, int],
    rounds: int,
    threads: int | None,
    bfloat16: bool,
    write: bool,
) -> None:
    """Print the table of the networks NAMES, or of all."""
    if threads:
        torch.set_num_threads(threads)
    click.get_current_context().with_resource(kept_memory())
    with tempfile.TemporaryDirectory() as folder:
        played = LEVELS["GoToLocal"]._replace(T=shape[0], B=shape[1])
        batch = next(batches(played, recorded("GoToLocal", Path(folder))))
    costs = [
        measured(name, batch, rounds, bfloat16)
        for name in tqdm(names or tuple(NETWORKS), unit=" networks", disable=None)
    ]
    said = (
        f"T x B = {shape[0]} x {shape[1]}, {'bfloat16' if bfloat16 else 'float32'}, "
        f"{counted(torch.get_num_threads(), 'thread')} of {platform.machine()}, "
        f"torch {torch.__version__}, {VOCABULARY} words, processor time, median of {rounds}."
    )
    text = f"{table(costs)}\n\n{said}\n"
    if not write:
        click.echo(text)
        return
    before, begin, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _old, end, after = rest.partition(END)
    if not begin or not end:
        raise click.UsageError(f"{PAGE} lacks the lines between which to write")
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
