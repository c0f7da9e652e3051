"""Every run of the study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

Part = Literal["levels", "demonstrations", "minutes", "recipes", "mazes", "few", "mixture"]
FOLDER = Path("build/study")
"""Of the runs, each in a folder of its name."""
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
_LONG = ("GoToSeq", "SynthSeq", "GoToImpUnlock")
"""Of nine rooms, with episodes and missions so long that twice the steps are shown."""
_TWICE = ("Synth", "SynthLoc")
"""Which the steps of the other mazes do not suffice for; they have runs of twice as many too."""
_LONG_STEPS = 16_000_000
_MAZES = ("GoTo", "GoToObjMaze", "Pickup", "UnblockPickup", "Open", "Unlock", "Synth", "SynthLoc")
_OF_MAZE = 40_000
"""How many episodes the bot plays of a level of nine rooms; of all other levels `ALL`."""
LEVELS = (*_LEVEL_STEPS, *_MAZES, *_LONG, "BossLevel")
"""Those of the paper that have an environment, the mazes last."""
_RETYPED = ("GoTo", "GoToObjMaze", "Pickup", "UnblockPickup", "Open", "GoToSeq")
"""The mazes whose manifests declare that symmetry."""
_MAZE_STEPS = 25_000_000
FASTER = "run.precision=bfloat16"
SMALL = "model.type=small"
_OF_SMALL = (SMALL, "optimizer.lr=4e-3")
"""What the recipe for few demonstrations had before it had the network `maze`."""
_MAZE_OVERRIDES = (
    f"stages.0.max_demo_steps={_MAZE_STEPS}",
    "stages.0.off_policy.rollouts=64",
    "stages.0.off_policy.rollout_len=80",
    'stages.0.off_policy.augment=["recolor", "mirror"]',
    "optimizer.lr=2e-3",
)
_SMALL_MAZES = {"GoTo": _OF_MAZE, "BossLevel": 20_000}
_MIXTURE_STEPS = 16_000_000
_FEW = {"GoToLocal": (100, 300, 500), "PutNextLocal": (1_000, 5_000)}
_FEW_STEPS = {"PutNextLocal": 4_000_000}
_SMALL_STEPS = 4_000_000
_MIXTURE_ROWS = {"GoTo": 4, "GoToSeq": 6, "SynthSeq": 8, "GoToImpUnlock": 8, "BossLevel": 16}
"""Rollouts of a level in the mixture of all; of every other 2."""
_ROLLOUTS = 128  # of bc_1000_demos.toml
_MINUTES_EVERY = 250_000


@dataclass(frozen=True)
class Experiment:
    """One run.

    level      "all": one network on a mixture of `LEVELS`, measured on each
    demos      episodes of the store that it learns from
    overrides  of the recipe, as `--set` takes them
    every      demonstration steps between measured checkpoints; None: only the last is measured
    begins     the folder of a run whose weights it begins with
    variant    what tells it from another run of the same recipe, store and seed
    """

    part: Part
    level: str
    demos: int
    recipe: str
    seed: int
    augmented: bool
    overrides: tuple[str, ...] = ()
    every: int | None = None
    begins: Path | None = None
    variant: str = ""

    @property
    def name(self) -> str:
        """Its folder, which tells it from all others."""
        kind = "augmented" if self.augmented else "plain"
        recipe = self.recipe.removesuffix(".toml")
        network = "-small" if SMALL in self.overrides else ""
        precision = "-bfloat16" if FASTER in self.overrides else ""
        how = f"{kind}-{recipe}{network}{precision}{self.variant}"
        return f"{self.part}/{self.level}-{self.demos}-{how}-seed{self.seed}"

    @property
    def precision(self) -> str:
        """What the products are computed in."""
        return "bfloat16" if FASTER in self.overrides else "float32"

    @property
    def levels(self) -> tuple[str, ...]:
        """What it learns, and is measured on."""
        return LEVELS if self.level == "all" else (self.level,)

    @property
    def stores(self) -> dict[str, int]:
        """The stores that it learns from, with their share of the rollouts."""
        if self.level == "all":
            return {level: _MIXTURE_ROWS.get(level, 2) for level in LEVELS}
        whole = self.demos == recorded(self.level)
        return {self.level if whole else f"{self.level}-{self.demos}": 1}

    @property
    def settings(self) -> list[str]:
        """What a run of its recipe is given, as `--set` takes it."""
        levels: str | list[str] = self.level
        (stores,) = self.stores if len(self.stores) == 1 else ("",)
        if self.level == "all":
            levels = list(self.levels)
            tables = (
                f"{{name = '{name}', proportion = {rows}}}" for name, rows in self.stores.items()
            )
            stores = f"[{', '.join(tables)}]"
        return [
            f"run.level={levels}",
            f"run.seed={self.seed}",
            f"stages.0.off_policy.store={stores}",
            *([] if self.begins is None else [f"run.init_from={self.begins.as_posix()}"]),
            *self.overrides,
        ]


def recorded(level: str) -> int:
    """How many episodes of a level the bot plays for the study."""
    return _OF_MAZE if level in (*_MAZES, *_LONG) else ALL


def experiments() -> Iterator[Experiment]:
    """All of them; what is wanted first comes first."""
    for seed in SEEDS:
        for level, steps in _LEVEL_STEPS.items():
            budget = (f"stages.0.max_demo_steps={steps}",)
            yield Experiment("levels", level, ALL, "bc_fast.toml", seed, False, budget)
        for demos in (1_000, 10_000):
            yield _few("recipes", "GoToLocal", demos, seed, small=True)
            yield _few("recipes", "GoToLocal", demos, seed)
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
    for level, demos in _SMALL_MAZES.items():
        chosen = (*_MAZE_OVERRIDES, FASTER) if level == "BossLevel" else _MAZE_OVERRIDES
        yield Experiment("mazes", level, demos, "bc_fast.toml", 1, True, chosen)
    yield from _with_map()


def _with_map() -> Iterator[Experiment]:
    """The runs of the network `maze`, and those from few demonstrations."""
    boss = Experiment("mazes", "BossLevel", ALL, "bc_bosslevel.toml", 1, True, (FASTER,))
    yield boss
    fewer = ("stages.0.max_demo_steps=24_000_000", FASTER)
    yield Experiment("mazes", "BossLevel", 20_000, "bc_bosslevel.toml", 1, True, fewer)
    two = 'stages.0.off_policy.augment=["recolor", "mirror"]'
    longer = f"stages.0.max_demo_steps={_LONG_STEPS}"
    for level in (*_MAZES, *_LONG):
        chosen = (FASTER,) if level in _RETYPED else (FASTER, two)
        if level in _LONG:
            yield _of_maze(level, 1, *chosen, longer)
        else:
            yield from (_of_maze(level, seed, *chosen) for seed in SEEDS)
        if level in _TWICE:
            yield _of_maze(level, 1, *chosen, longer, variant="-16M")
    yield Experiment("few", "GoTo", 10_000, "bc_goto.toml", 1, True, (FASTER,))
    for demos in _FEW["GoToLocal"]:
        yield _few("few", "GoToLocal", demos, 1, small=True)
    for seed, (level, counts) in product(SEEDS, _FEW.items()):
        yield from (_few("few", level, demos, seed) for demos in counts)
    rows = f"stages.0.off_policy.rollouts={sum(_MIXTURE_ROWS.get(level, 2) for level in LEVELS)}"
    of_all = (f"stages.0.max_demo_steps={_MIXTURE_STEPS}", rows, "optimizer.lr=1.4e-3", FASTER, two)
    start = FOLDER / boss.name
    yield Experiment("mixture", "all", ALL, "bc_bosslevel.toml", 1, True, of_all, begins=start)


def _of_maze(level: str, seed: int, *overrides: str, variant: str = "") -> Experiment:
    """A run of a level of nine rooms on its own."""
    recipe = "bc_goto.toml"
    return Experiment("mazes", level, _OF_MAZE, recipe, seed, True, overrides, variant=variant)


def _few(part: Part, level: str, demos: int, seed: int, *, small: bool = False) -> Experiment:
    """A run of the recipe for few demonstrations, with the network `maze` or with `small`."""
    steps = _SMALL_STEPS if small else _FEW_STEPS.get(level)
    of_few = [f"stages.0.max_demo_steps={steps}"] if steps else []
    if demos < _ROLLOUTS:
        of_few.append(f"stages.0.off_policy.rollouts={demos}")  # at least one episode for each
    of_few += (*_OF_SMALL, "run.precision=float32") if small else [FASTER]
    return Experiment(part, level, demos, "bc_1000_demos.toml", seed, True, tuple(of_few))


def _demonstrations(demos: int, seed: int, *, augmented: bool) -> Experiment:
    overrides = [f"stages.0.max_demo_steps={_DEMONSTRATIONS_STEPS}", FASTER, *_OF_SMALL]
    if demos < _ROLLOUTS:
        overrides.append(f"stages.0.off_policy.rollouts={demos}")  # at least one episode for each
    if not augmented:
        overrides.append("stages.0.off_policy.augment=[]")
    recipe = "bc_1000_demos.toml"
    return Experiment(
        "demonstrations", "GoToLocal", demos, recipe, seed, augmented, tuple(overrides)
    )
