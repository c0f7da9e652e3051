"""Several stores, filters, iterators of one's own: what a stage's section off_policy can name."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given

from demotools.babyai.vocabulary import WORDS
from demotools.errors import SettingsError, StoreError
from demotools.store.reading import open_store
from tests.conftest import build_store, make_episodes
from trainer.acting.vector import EnvironmentKind, VectorEnvironment, dealt_levels
from trainer.cli import main
from trainer.data.own_iterator import OwnIterator
from trainer.run.checkpoint import read_checkpoint
from trainer.run.folder import refuse_early
from trainer.run.log import read_log
from trainer.settings.models import LevelSettings, Named, parsed_settings, read_settings, toml_of

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "pipelines.md").read_text("utf-8")
EXACT = ("--tiny", "--set", "evaluation=", "--set", "on_policy=", "-m", "1")
SMALL = (
    *("--set", "stages.0.off_policy.rollouts=10", "--set", "stages.0.max_demo_steps=640"),
    *("--set", "run.keep=9", "--set", "run.save_every_demo_steps=160"),
)

pytestmark = pytest.mark.usefixtures("one_thread")


def section(name: str, language: str) -> str:
    """The first example of a section of docs/pipelines.md."""
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
        ("[]", "there is no store: name at least one"),
        ("[{nme='GoToObj'}]", "unknown key `stages.0.off_policy.store.0.nme`"),
        ("[{name='GoToObj', proportion=0}]", "store.0.proportion"),
        ("[{name='GoToObj', mission='('}]", "not a regular expression"),
        ("[{name='GoToObj', mission='purple'}]", "no episode of this store matches"),
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
    chosen = {"name": "GoToObj", "mission": "red|grey", "min_length": 3, "max_length": 4}
    tree["stages"][0]["off_policy"]["store"] = [{**chosen, "min_seed": 9, "max_seed": 36}]
    tree["stages"][0]["off_policy"]["rollouts"] = 1
    store = open_store(data / "GoToObj.zarr")
    [[source]] = stage_sources(parsed_settings(tree, "-"), {"GoToObj": store})
    wanted = [
        row
        for row, episode in enumerate(store)
        if re.search("red|grey", episode.mission)
        and 3 <= len(episode) <= 4
        and 9 <= episode.seed <= 36
    ]
    assert source.chosen is not None and source.chosen.tolist() == wanted != []


STATEFUL = """
import numpy as np

class Drawn:
    def __init__(self, rollouts, rollout_len, words, seed, k=1):
        self.shape, self.random = (rollout_len, rollouts), np.random.default_rng(seed + k)
        self.missions = ["go to the red ball", words[0]]

    def __iter__(self):
        return self

    def __next__(self):
        draw = lambda most, *tail: self.random.integers(0, most, (*self.shape, *tail))
        return {
            "cells": draw(198, 7, 7).astype(np.uint8), "direction": draw(4), "masks": draw(2),
            "expert_action": draw(8) - 1, "mission": draw(2), "reward": draw(9).astype(np.float32),
        }

    def state(self):
        return self.random.bit_generator.state

    def load_state(self, state):
        self.random.bit_generator.state = state
"""


def iterator_of(code: str, folder: Path, name: str) -> tuple[str, ...]:
    """The settings that name an iterator in a module of the test's own."""
    (folder / f"{name}.py").write_text(code, "utf-8")
    return ("--set", "stages.0.off_policy.augment=[]")


@pytest.mark.parametrize("kind", ["page", "stateful"])
def test_an_iterator_of_ones_own_trains_and_resumes_bit_for_bit(
    kind: str, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, name = STATEFUL, "{type='own_stateful:Drawn', k=3}"
    if kind == "page":
        page = (DOCS / "own_parts.md").read_text("utf-8")
        code = next(
            text for text in re.findall(r"```python\n(.*?)```", page, re.S) if "Curriculum" in text
        )
        assert len([line for line in code.splitlines() if line.strip()]) <= 15
        name = "{type='own_page:Curriculum', batches=3}"
    line = (
        *(*EXACT, *SMALL, *iterator_of(code, tmp_path, f"own_{kind}")),
        *("--set", f"stages.0.off_policy.iterator={name}"),
        *(("--set", "stages.0.off_policy.store=") if kind == "stateful" else ()),
    )
    result = run("whole", *line)
    assert result.exit_code == 0, result.output
    assert "640 demo steps, 8 updates" in result.output
    written = tomllib.loads((tmp_path / "whole" / "settings.toml").read_text())
    stores = written["stages"][0]["off_policy"]["store"]
    assert stores == ("GoToLocal" if kind == "page" else [])
    assert resumed_from_the_middle(run, tmp_path, *line)
    # a run's settings may be anybody's
    refused = run("other", recipe=str(tmp_path / "whole" / "settings.toml"))
    assert refused.exit_code == 1 and f"own_{kind}:" in refused.output


def own(code: str, folder: Path, **options: Any) -> OwnIterator:
    """An iterator of this code, for 2 rollouts of 3 steps."""
    name = f"own_{abs(hash((code, str(folder))))}"
    (folder / f"{name}.py").write_text(code, "utf-8")
    handed = {"stores": [], "rollouts": 2, "rollout_len": 3, "seed": 1, "rank": 0, "world": 1}
    settings = Named(type=f"{name}:make", **options)
    key = "stages.0.off_policy.iterator.type"
    return OwnIterator(settings, key, **handed, words=WORDS, quiet=True)


BATCHES = """
import numpy as np
def batch(number=0, **changed):
    full = lambda value, *tail: np.full((3, 2, *tail), value)
    made = dict(cells=full(3, 7, 7), direction=full(1), masks=full(1), expert_action=full(number),
                mission=full(0), missions=["go to the red ball"]) | changed
    return {name: value for name, value in made.items() if value is not None}
"""


def test_what_ends_begins_anew_and_goes_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = {
        "a generator": "def make():\n    for number in range(3): yield batch(number)",
        "a list": "make = lambda: [batch(number) for number in range(3)]",
        "one with next alone": "class make:\n    n = -1\n    def __next__(self):\n"
        "        self.n = (self.n + 1) % 3\n        return batch(self.n)",
    }
    for code in kinds.values():
        batches = own(BATCHES + code, tmp_path)
        assert [int(next(batches)["expert_action"][0, 0]) for _ in range(7)] == [0, 1, 2] * 2 + [0]
        resumed = own(BATCHES + code, tmp_path)
        resumed.load_state(batches.state())
        assert int(next(resumed)["expert_action"][0, 0]) == 1


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ("cells=None", "a batch has no `cells`, only"),
        ("cells=np.zeros((3, 2, 7))", r"`cells` has shape \[3, 2, 7\], not \[3, 2, H, W\]"),
        ("direction=np.zeros((2, 3))", r"`direction` has shape \[2, 3\], not \[3, 2\]"),
        ("expert_action=np.full((3, 2), 7)", "values from 7 to 7, not within -1 to 6"),
        ("mission=np.full((3, 2), 1)", "`mission` has values from 1 to 1, not within 0 to 0"),
        ("missions=None", "neither `mission_tokens` nor `missions`"),
        ("missions=['lick the ball']", "has the word `lick`"),
        ("mission_tokens=[[999]]", "are not rows of word ids"),
        ("masks=np.ones((2, 3))", "next:  put time first"),
        ("cells=np.zeros((3, 2, 7, 7, 3))", "next:  pack images .* layout="),
        ("cells=None, minigrid_ego_image=np.zeros((3, 2, 7, 7, 3))", "next:  pack images"),
        ("expert_action=np.full((3, 2), None)", "`expert_action` cannot become a tensor"),
        ("note=['x']", "`note` cannot become a tensor: too many dimensions"),
        ("missions=['lick the ball']", r"`model.words = \[\"lick\"\]`"),
    ],
)
def test_a_batch_that_is_none_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    batches = own(f"{BATCHES}\nmake = lambda: [batch({changed})]", tmp_path)
    with pytest.raises(SettingsError, match=what):
        next(batches)


def test_other_ways_to_be_no_iterator_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for code, what in (
        ("make = lambda: []", "yields no batch"),
        ("make = lambda: [3]", "not a dict"),
    ):
        with pytest.raises(SettingsError, match=what):
            next(own(code, tmp_path))
    with pytest.raises(SettingsError, match="unknown key `j`"):
        own("def make(k): return []", tmp_path, j=1)
    odd = own(
        "import numpy\nclass make:\n    def __next__(self): pass\n"
        "    def state(self): return {'at': numpy.int64(3)}\n    def load_state(self, state): pass",
        tmp_path,
    )
    with pytest.raises(SettingsError, match="its state must contain only numbers"):
        odd.state()
    failing = own("def make():\n    yield 1 / 0", tmp_path)
    with pytest.raises(ZeroDivisionError) as caught:
        next(failing)
    assert "stages.0.off_policy.iterator.type" in caught.value.__notes__[0]


@pytest.mark.parametrize("more", ["shuffle='windowed'", "store=[{name='GoToObj', max_length=4}]"])
def test_what_an_iterator_would_leave_out_is_refused(run: Callable[..., Result], more: str) -> None:
    given = (
        "--set",
        "stages.0.off_policy.iterator='a:B'",
        "--set",
        "stages.0.off_policy.augment=[]",
    )
    result = run("a", *EXACT, *given, "--set", f"stages.0.off_policy.{more}")
    assert result.exit_code == 1
    assert ("filter them there" if "store" in more else "do this in yours") in result.output


def test_an_iterator_of_ones_own_needs_no_store(tmp_path: Path) -> None:
    unset = ["stages.0.off_policy.store=", "stages.0.off_policy.augment=[]"]
    own = [*unset, "stages.0.off_policy.iterator='a:B'"]
    refuse_early("bc_small_cpu.toml", overrides=own, data_dir=tmp_path, new=False)
    with pytest.raises(StoreError, match="no such demo store"):
        refuse_early("bc_small_cpu.toml", overrides=unset, data_dir=tmp_path, new=False)


PLAIN = ("--set", "stages.0.off_policy.augment=[]")
LEVELS = "run.level=[{name='GoToLocal', proportion=2}, 'PickupLoc', 'GoToObj']"


@pytest.mark.slow
def test_several_levels_train_in_proportion_resume_and_are_measured_one_by_one(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    line = (
        *("--tiny", "--set", LEVELS, *SMALL, "--set", "stages.0.off_policy.store=auto", "-m", "1"),
        *PLAIN,
        *("--set", "evaluation.episodes=3"),
    )
    result = run("whole", *line)
    assert result.exit_code == 0, result.output
    for said in (
        "GoToLocal: 5 of 10 rollouts",
        "GoToObj: success",
        "GoToLocal + PickupLoc + GoToObj: success",
        "of 9 episodes",
    ):
        assert said in result.output, result.output
    measured = next(one for one in read_log(tmp_path / "whole") if one["group"] == "evaluation")
    each = [measured[f"{name}/success"] for name in ("GoToLocal", "PickupLoc", "GoToObj")]
    assert measured["success"] == pytest.approx(sum(each) / 3) and measured["episodes"] == 9
    assert resumed_from_the_middle(run, tmp_path, *line)
    evaluate = ["evaluate", str(tmp_path / "whole"), "--episodes", "3", "--json", "-m", "1"]
    found = json.loads(CliRunner().invoke(main, evaluate).stdout)
    assert [level["level"] for level in found["levels"]] == ["GoToLocal", "PickupLoc", "GoToObj"]
    assert found["success"] == measured["success"]
    alone = CliRunner().invoke(main, [*evaluate, "--level", "GoToObj"])
    assert json.loads(alone.stdout) == found["levels"][2]


def test_each_environment_plays_its_level_whatever_the_processes() -> None:
    levels = [LevelSettings(name="GoToObj", proportion=3.0), LevelSettings(name="PickupLoc")]
    names = dealt_levels(levels, 8)
    assert names == ("GoToObj", "GoToObj", "PickupLoc", "GoToObj") * 2
    shown = []
    for processes in (1, 3):
        kind = EnvironmentKind(names)
        with VectorEnvironment(kind, 8, processes=processes) as vector:
            shown.append(vector.reset([range(7, 99)] * 8))
    assert shown[0].missions == shown[1].missions
    assert (shown[0].cells == shown[1].cells).all()
    # the same seed: what differs is the level
    verbs = [mission.split()[0] for mission in shown[0].missions]
    assert verbs == ["go", "go", "pick", "go"] * 2


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 40)
)
def test_levels_are_dealt_evenly_in_every_stretch(
    shares: list[float], times: int, count: int
) -> None:
    levels = [
        LevelSettings(name=f"L{number}", proportion=share) for number, share in enumerate(shares)
    ]
    wanted = [share / sum(shares) * count * times for share in shares]
    try:
        names = dealt_levels(levels, count * times)
    except SettingsError:
        assert min(wanted) < 1
        return
    for level, share in zip(levels, wanted, strict=True):
        assert abs(names.count(level.name) - share) < len(levels)


def test_one_level_is_written_as_one_and_wrong_lists_are_refused(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    tree = tomllib.loads(toml_of(read_settings("bc_small_cpu")))
    plain = parsed_settings(tree, "-")
    del tree["run"]["level"]
    tree["run"]["levels"] = ["GoToLocal"]
    assert parsed_settings(tree, "-") == plain
    assert tomllib.loads(toml_of(plain))["run"]["level"] == "GoToLocal"
    tree["run"]["levels"] = ["GoToLocal", {"name": "GoToObj", "weight": 2}]
    both = parsed_settings(tree, "-")
    (tmp_path / "both.toml").write_text(toml_of(both), "utf-8")
    plain_store = ("--set", "stages.0.off_policy.store=auto", *PLAIN, *SMALL)
    dry = run("a", *plain_store, "-m", "1", "--dry-run", recipe=str(tmp_path / "both.toml"))
    again = tomllib.loads(dry.output)
    assert [one["proportion"] for one in again["stages"][0]["off_policy"]["store"]] == [1, 2]
    assert again["run"]["level"][1]["name"] == "GoToObj"
    assert both.run.level_names == ("GoToLocal", "GoToObj")
    assert parsed_settings(tomllib.loads(toml_of(both)), "-") == both
    for levels, what in (
        ("[]", "there is no level"),
        ("['GoToObj', 'GoToObj']", "is listed twice"),
        ("['GoToObj', 'GoToNowhere']", "there is no such level"),
        ("[{name='GoToObj', share=3}, 'GoToLocal']", "unknown key `run"),
        ("[{name='GoToObj', proportion=99}, 'GoToLocal']", "too few for 2 levels"),
    ):
        result = run("a", "--tiny", *SMALL, *PLAIN, "-m", "1", "--set", f"run.level={levels}")
        assert result.exit_code == 1 and what in result.output, result.output
        assert not (tmp_path / "a").exists()
