"""Which levels does the bot solve, how often, in how many steps, and how fast is that recorded?

python benchmarks/bench_levels.py                    # every level, 200 episodes each
python benchmarks/bench_levels.py --write            # the same, into docs/levels.md
python benchmarks/bench_levels.py BossLevel --episodes 1000
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
from tqdm import tqdm

from demotools.babyai.levels import all_level_names, level_names, read_manifest
from demotools.recording.bot import Failure, record_episode
from demotools.recording.environment import make_environment
from demotools.recording.record import RATE_AT_LEAST

PAGE = Path(__file__).parents[1] / "docs" / "levels.md"
MARK = "<!-- written by benchmarks/bench_levels.py: do not edit below -->\n"


@dataclass(frozen=True)
class Result:
    """What the bot did on the first seeds of one level."""

    level: str
    lengths: list[int]
    failures: Counter[str]
    seconds: float

    @property
    def rate(self) -> float:
        return len(self.lengths) / (len(self.lengths) + self.failures.total())

    def row(self) -> str:
        mean = f"{sum(self.lengths) / len(self.lengths):.1f}" if self.lengths else "-"
        longest = str(max(self.lengths, default="-"))
        speed = f"{sum(self.lengths) / self.seconds:,.0f}" if self.lengths else "-"
        reasons = "; ".join(f"{number} {why}" for why, number in self.failures.most_common())
        refused = " (refused)" if self.rate < RATE_AT_LEAST else ""
        cells = (self.level, f"{self.rate:.1%}{refused}", mean, longest, speed, reasons)
        return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def measured(level: str, episodes: int) -> Result:
    """The bot on seeds 0 to `episodes` - 1 of one level, on one core."""
    environment = make_environment(level)
    lengths, failures = [], Counter[str]()
    started = time.perf_counter()
    for seed in range(episodes):
        played = record_episode(environment, seed)
        if isinstance(played, Failure):
            failures[played.reason] += 1
        else:
            lengths.append(len(played.action))
    return Result(level, lengths, failures, time.perf_counter() - started)


def table(results: list[Result]) -> str:
    head = "| level | solved | mean steps | longest | steps/s | failures, by reason |"
    line = "| --- | ---: | ---: | ---: | ---: | --- |"
    return "\n".join([head, line, *(result.row() for result in results)])


def page(results: list[Result], episodes: int) -> str:
    """The generated part of docs/levels.md."""
    paper = [result for result in results if result.level in level_names()]
    others = [result for result in results if result.level not in level_names()]
    machine = (
        f"minigrid {version('minigrid')}, Python {platform.python_version()}, one core of "
        f"{platform.machine()}, seeds 0 to {episodes - 1:,} of each level."
    )
    missing = f"PutNext: {read_manifest('PutNext').no_environment}."
    return "\n".join(
        [
            *(MARK, f"Measured with {machine}", ""),
            *("## The levels of the paper", "", table(paper)),
            *("| PutNext | - | - | - | - | no environment |", "", missing, ""),
            *("## All others", "", table(others), ""),
        ]
    )


@click.command()
@click.argument("levels", nargs=-1)
@click.option("--episodes", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--write", is_flag=True, help="Write the table into docs/levels.md.")
def main(levels: tuple[str, ...], episodes: int, write: bool) -> None:
    """Print the table of LEVELS, or of all that have an environment."""
    playable = (name for name in all_level_names() if read_manifest(name).environment_id)
    names = levels or tuple(playable)
    results = [measured(name, episodes) for name in tqdm(names, unit=" levels", disable=None)]
    if write:
        head, mark, _old = PAGE.read_text("utf-8").partition(MARK)
        if not mark:
            raise click.UsageError(f"{PAGE} lacks the line that says where to write")
        PAGE.write_text(head + page(results, episodes), "utf-8")
    else:
        click.echo(table(results))


if __name__ == "__main__":
    main()
