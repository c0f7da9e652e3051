"""Every run of the study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Part = Literal["levels", "demonstrations", "minutes", "recipes", "mazes"]
ALL = 200_000
COUNTS = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, ALL)
SEEDS = (1, 2, 3)
"""Of training; how many, and which, was settled before any run."""
_LEVEL_STEPS = {
    "GoToObj": 3_000_000,
    "GoToRedBallGrey": 3_000_000,
    "GoToRedBall": 3_000_000,
    "GoToLocal": 6_000_000,
    "PickupLoc": 6_000_000,
    "PutNextLocal": 6_000_000,
}
_DEMONSTRATIONS_STEPS = 2_000_000
_MAZE_DEMOS = {"GoTo": 40_000, "BossLevel": 20_000}
_MAZE_STEPS = 25_000_000
FASTER = "run.precision=bfloat16"
_MAZE_OVERRIDES = (
    f"stages.0.max_demo_steps={_MAZE_STEPS}",
    "stages.0.off_policy.rollouts=64",
    "stages.0.off_policy.rollout_len=80",
    'stages.0.off_policy.augment=["recolor", "mirror"]',
    "optimizer.lr=2e-3",
)
_ROLLOUTS = 128  # of bc_1000_demos.toml
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
        precision = "-bfloat16" if FASTER in self.overrides else ""
        return f"{self.part}/{self.level}-{self.demos}-{kind}-{recipe}{precision}-seed{self.seed}"

    @property
    def precision(self) -> str:
        """What the products are computed in."""
        return "bfloat16" if FASTER in self.overrides else "float32"

    @property
    def store(self) -> str:
        """The name of the store that it learns from."""
        whole = self.demos == recorded(self.level)
        return self.level if whole else f"{self.level}-{self.demos}"


def recorded(level: str) -> int:
    """How many episodes of a level the bot plays for the study."""
    return _MAZE_DEMOS.get(level, ALL)


def experiments() -> Iterator[Experiment]:
    """All of them; what is wanted first comes first."""
    for seed in SEEDS:
        for level, steps in _LEVEL_STEPS.items():
            budget = (f"stages.0.max_demo_steps={steps}",)
            yield Experiment("levels", level, ALL, "bc_fast.toml", seed, False, budget)
        for demos in (1_000, 10_000):
            yield Experiment("recipes", "GoToLocal", demos, "bc_1000_demos.toml", seed, True)
    for seed in SEEDS:
        for demos in COUNTS:
            for augmented in (True, False):
                yield _demonstrations(demos, seed, augmented=augmented)
    for seed in SEEDS:
        for precision in ((), (FASTER,)):
            recipe = "bc_fast.toml"
            yield Experiment(
                "minutes", "GoToLocal", ALL, recipe, seed, False, precision, _MINUTES_EVERY
            )
    for level, demos in _MAZE_DEMOS.items():
        chosen = (*_MAZE_OVERRIDES, FASTER) if level == "BossLevel" else _MAZE_OVERRIDES
        yield Experiment("mazes", level, demos, "bc_fast.toml", 1, True, chosen)


def _demonstrations(demos: int, seed: int, *, augmented: bool) -> Experiment:
    overrides = [f"stages.0.max_demo_steps={_DEMONSTRATIONS_STEPS}", FASTER]
    if demos < _ROLLOUTS:
        overrides.append(f"stages.0.off_policy.rollouts={demos}")  # at least one episode for each
    if not augmented:
        overrides.append("stages.0.off_policy.augment=[]")
    recipe = "bc_1000_demos.toml"
    return Experiment(
        "demonstrations", "GoToLocal", demos, recipe, seed, augmented, tuple(overrides)
    )
