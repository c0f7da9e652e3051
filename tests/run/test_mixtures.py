"""Several stores, filters, iterators of one's own: what a stage's section off_policy can name."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from demotools.store.reading import open_store
from tests.conftest import build_store, make_episodes
from trainer.cli import main
from trainer.run.checkpoint import read_checkpoint
from trainer.settings.models import parsed_settings, read_settings, toml_of

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
EXACT = ("--tiny", "--set", "evaluation=", "--set", "on_policy=", "-m", "1")
SMALL = (
    *("--set", "stages.0.off_policy.rollouts=10", "--set", "stages.0.max_demo_steps=640"),
    *("--set", "run.keep=9", "--set", "run.save_every_demo_steps=160"),
)

pytestmark = pytest.mark.usefixtures("one_thread")


def section(name: str, language: str) -> str:
    """The first example of a section of docs/training.md."""
    [text] = re.findall(rf"\n## {name}\n(.*?)(?=\n## |\Z)", PAGE, re.S)
    return str(re.findall(rf"```{language}\n(.*?)```", text, re.S)[0])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of three levels, each with episodes of its own kind, only to be read."""
    folder = tmp_path_factory.mktemp("data")
    for number, level in enumerate(("GoToLocal", "PickupLoc", "GoToObj")):
        lengths = [2 + (number + row) % 9 for row in range(60)]
        build_store(folder / f"{level}.zarr", make_episodes(lengths, number), level=level)
    return folder


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Callable[..., Result]:
    """`run("a", …)` trains bc_small_cpu, or the recipe beside it, into the folder a."""

    def trainer_run(folder: str, *arguments: str, recipe: str = "bc_small_cpu") -> Result:
        line = ["run", recipe, "-o", str(tmp_path / folder), "--data-dir", str(data)]
        return CliRunner().invoke(main, [*line, *arguments])

    return trainer_run


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (read_checkpoint(folder, trust=True).model for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def resumed_from_the_middle(run: Callable[..., Result], tmp_path: Path, *line: str) -> bool:
    """Whether a run taken up from a checkpoint inside ends as the whole one has."""
    copies = sorted((tmp_path / "whole").glob("after-*.pt"))
    assert len(copies) >= 2
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/last.pt").write_bytes(copies[0].read_bytes())
    resumed = run("cut", *line, "--resume")
    assert resumed.exit_code == 0, resumed.output
    return same_weights(tmp_path / "whole", tmp_path / "cut")


def test_the_mixture_on_the_page_trains_and_resumes_bit_for_bit(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    recipe = read_settings("bc_small_cpu", tiny=True).model_dump(exclude_none=True, by_alias=True)
    mixture = tomllib.loads(section("Mixtures and filters", "toml"))["stages"][0]["off_policy"]
    recipe["stages"][0]["off_policy"] |= {**mixture, "augment": []}
    (tmp_path / "mixture.toml").write_text(toml_of(parsed_settings(recipe, "-")), "utf-8")
    line = tuple(word for word in (*EXACT, *SMALL) if word != "--tiny")
    result = run("whole", *line, recipe=str(tmp_path / "mixture.toml"))
    assert result.exit_code == 0, result.output
    said = [line for line in result.output.splitlines() if "rollouts, " in line]
    assert said == [
        "GoToLocal: 5 of 10 rollouts, 60 of 60 episodes",
        "PickupLoc: 3 of 10 rollouts, 14 of 60 episodes",
        "GoToObj: 2 of 10 rollouts, 60 of 60 episodes",
    ]

    def again(folder: str, *more: str) -> Result:
        return run(folder, *more, recipe=str(tmp_path / "mixture.toml"))

    assert resumed_from_the_middle(again, tmp_path, *line)


def test_one_store_is_written_as_one_and_synonyms_are_understood() -> None:
    def settings(store: object, key: str = "store") -> Any:
        tree = tomllib.loads(toml_of(read_settings("bc_small_cpu")))
        del tree["stages"][0]["off_policy"]["store"]
        tree["stages"][0]["off_policy"][key] = store
        return parsed_settings(tree, "-")

    plain = settings("GoTo")
    assert tomllib.loads(toml_of(plain))["stages"][0]["off_policy"]["store"] == "GoTo"
    assert settings(["GoTo"]) == settings({"name": "GoTo"}, "stores") == plain
    assert settings(["A", "B"]) == settings([{"store": "A"}, {"name": "B", "weight": 1.0}])
    shorter = settings([{"name": "A", "longest": 64, "proportion": 0.3}])
    assert shorter == settings([{"store": "A", "max_length": 64, "weight": 0.3}])
    assert parsed_settings(tomllib.loads(toml_of(shorter)), "-") == shorter


@pytest.mark.parametrize(
    ("stores", "what"),
    [
        ("[]", "at least 1 item"),
        ("[{nme='GoToObj'}]", "unknown key `stages.0.off_policy.store.0.nme`"),
        ("[{name='GoToObj', proportion=0}]", "store.0.proportion"),
        ("[{name='GoToObj', mission='('}]", "not a regular expression"),
        ("[{name='GoToObj', mission='purple'}]", "no episode of this store fits"),
        ("[{name='GoToObj', min_length=99}]", "have 2 to 10 steps"),
        ("[{name='GoToObj', max_seed=-7}]", "seeds from 0 to 59"),
        ("[{name='GoToObj', proportion=99}, 'GoToLocal']", "too few for 2 stores"),
        ("['GoToObj', 'Nowhere']", "no such demo store"),
    ],
)
def test_a_wrong_mixture_is_refused_before_anything_is_written(
    run: Callable[..., Result], tmp_path: Path, stores: str, what: str
) -> None:
    result = run("a", *EXACT, *SMALL, "--set", f"stages.0.off_policy.store={stores}")
    assert result.exit_code == 1, result.output
    assert what in result.output and "\n  next:  " in result.output, result.output
    assert not (tmp_path / "a").exists()


def test_filters_choose_by_mission_length_and_seed(data: Path) -> None:
    from trainer.data.sources import stage_sources

    tree = tomllib.loads(toml_of(read_settings("bc_small_cpu")))
    chosen = {"name": "GoToObj", "mission": "red|grey", "min_length": 3, "max_length": 5}
    tree["stages"][0]["off_policy"]["store"] = [{**chosen, "min_seed": 10, "max_seed": 40}]
    store = open_store(data / "GoToObj.zarr")
    [[source]] = stage_sources(parsed_settings(tree, "-"), {"GoToObj": store})
    wanted = [
        row
        for row, episode in enumerate(store)
        if re.search("red|grey", episode.mission)
        and 3 <= len(episode) <= 5
        and 10 <= episode.seed <= 40
    ]
    assert source.chosen is not None and source.chosen.tolist() == wanted != []
