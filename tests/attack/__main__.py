"""Attack the promises: `python -m tests.attack [--only NAME]... [--seconds N]`."""

from __future__ import annotations

import importlib
import os
import resource
import sys
from pathlib import Path

import click

from tests.attack.campaign import ATTACKS, Attack, conducted, keep

MEMORY_BYTES = 6 << 30
SUITES = ("interrupted", "tampered", "starved", "lied_to")


def all_attacks() -> dict[str, Attack]:
    """Every attack of the suites, by name."""
    for suite in SUITES:
        importlib.import_module(f"tests.attack.{suite}")
    return ATTACKS


@click.command()
@click.option("--only", multiple=True, metavar="NAME", help="Only the attacks with these names.")
@click.option("--seconds", type=float, default=120, help="For each attack.", show_default=True)
@click.option("--seed", type=int, default=0, help="What the dice begin with.", show_default=True)
@click.option("--dry-run", is_flag=True, help="List the attacks, and stop.")
def main(only: tuple[str, ...], seconds: float, seed: int, dry_run: bool) -> None:
    """Attack every promise, and keep the figures in docs/reliability.md."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a copy of this process has none of its threads
    attacks = all_attacks()
    if unknown := set(only) - set(attacks):
        raise click.UsageError(f"there is no attack `{min(unknown)}`: see --dry-run")
    chosen = [one for name, one in attacks.items() if not only or name in only]
    if dry_run:
        for one in chosen:
            click.echo(f"{one.name:24}{one.promise}")
        return
    # what is lied to about a size must not take the machine down with it
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    figures = []
    for figure in conducted(chosen, seconds, seed):
        figures.append(figure)
        counts = f"tried {figure.tried:6,}  held {figure.held:6,}"
        click.echo(f"{figure.name:24}{counts}  {figure.seconds:6.1f} s")
        for failure in figure.failures[:5]:
            click.echo(f"    {failure}")
    keep(figures)
    broken = sum(figure.tried - figure.held for figure in figures)
    click.echo(f"{sum(f.tried for f in figures):,} tried, {broken:,} broken")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    main()
