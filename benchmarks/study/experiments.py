"""Every run of the study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Part = Literal["levels", "demonstrations", "minutes", "recipes"]
ROOM_LEVELS = (
    "GoToObj",
    "GoToRedBallGrey",
    "GoToRedBall",
    "GoToLocal",
    "PickupLoc",
    "PutNextLocal",
)
ALL = 200_000
COUNTS = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, ALL)
SEEDS = (1, 2, 3)
"""Of training; how many, and which, was settled before any run."""
# what the harder levels take beyond the recipe's 4 million steps
_LEVEL_STEPS = {"PutNextLocal": 24_000_000, "PickupLoc": 8_000_000, "GoToLocal": 8_000_000}
_MINUTES_EVERY = 250_000


@dataclass(frozen=True)
class Experiment:
    """One run.

    demos      episodes of the store that it learns from
    overrides  of the recipe, as `--set` takes them
    every      demonstration steps between measured checkpoints; None: only the last is measured
    """

    part: Part
    level: str
    demos: int
    recipe: str
    seed: int
    augmented: bool
    overrides: tuple[str, ...] = ()
    every: int | None = None

    @property
    def name(self) -> str:
        """Its folder, which tells it from all others."""
        kind = "augmented" if self.augmented else "plain"
        recipe = self.recipe.removesuffix(".toml")
        return f"{self.part}/{self.level}-{self.demos}-{kind}-{recipe}-seed{self.seed}"

    @property
    def store(self) -> str:
        """The name of the store that it learns from."""
        return self.level if self.demos == ALL else f"{self.level}-{self.demos}"


def experiments() -> Iterator[Experiment]:
    """All of them; what is wanted first comes first."""
    for seed in SEEDS:
        for level in ROOM_LEVELS:
            steps = _LEVEL_STEPS.get(level)
            overrides = (f"stages.0.max_demo_steps={steps}",) if steps else ()
            yield Experiment("levels", level, ALL, "bc_small_cpu.toml", seed, True, overrides)
        yield Experiment("recipes", "GoToLocal", 1_000, "bc_1000_demos.toml", seed, True)
        yield Experiment("recipes", "GoToLocal", 10_000, "bc_1000_demos.toml", seed, True)
    for seed in SEEDS:
        for demos in COUNTS:
            for augmented in (True, False):
                overrides = () if augmented else ("stages.0.off_policy.augment=[]",)
                yield Experiment(
                    "demonstrations",
                    "GoToLocal",
                    demos,
                    "bc_small_cpu.toml",
                    seed,
                    augmented,
                    overrides,
                )
    for seed in SEEDS:
        yield Experiment(
            "minutes", "GoToLocal", ALL, "bc_fast.toml", seed, False, every=_MINUTES_EVERY
        )
