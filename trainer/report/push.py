"""Publish a policy on the Hugging Face hub, with a model card that says how well it plays.

It uploads the files of `trainer.run.published`, `evaluation.json` with the measurements of `trainer
evaluate`, the animation `policy.gif`, the learning curve if the run has a log, and the card. The
header of the card has the keys that the hub documents, as JSON, which is valid YAML.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demotools.errors import DemotoolsError, printable_text
from demotools.exchange.hub import CARD, Repository, repository_of
from demotools.output import size_text, working_folder, write_output
from trainer.acting.evaluate import Evaluation
from trainer.acting.watched import Watched, watched_gif
from trainer.learning.networks.base import parameter_count
from trainer.report.plot import plot_runs
from trainer.report.watch import watched_episodes
from trainer.run.checkpoint import Checkpoint, named_checkpoint
from trainer.run.log import CURVE_FILE
from trainer.run.published import handed_on, write_policy
from trainer.run.success import measured_success

EVALUATION_FILE = "evaluation.json"
GIF_FILE = "policy.gif"
_SHOWN_EPISODES, _SHOWN_STEPS = 4, 150


@dataclass(frozen=True)
class Pushed:
    """What was published; `url` is None where it only would have been."""

    files: dict[str, int]
    url: str | None
    evaluation: Evaluation

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values; files with their bytes."""
        return {
            "files": self.files,
            "url": self.url,
            "evaluation": self.evaluation.as_json(),
        }

    def text(self) -> str:
        """All of it for a person."""
        files = ", ".join(f"{name} ({size_text(size)})" for name, size in self.files.items())
        done = f"published {files}: {self.url}" if self.url else f"would publish {files}"
        return f"{self.evaluation.text()}\n{done}"


def push_policy(
    checkpoint: Path,
    place: str,
    *,
    episodes: int = 1000,
    workers: int | None = None,
    private: bool = False,
    licence: str | None = None,
    dry_run: bool = False,
    trust: bool = False,
    quiet: bool = True,
) -> Pushed:
    """Publish the policy of a checkpoint as the model `hf:OWNER/NAME`, made where it is new.

    episodes   unseen ones on which its success is measured for the card
    licence    of the weights, by the hub's id; None: the card states none
    dry_run    make everything, send nothing

    CheckpointError  see `named_checkpoint` and `write_policy`
    FetchError       see `Repository`
    LevelError       the level has no environment to measure the success in
    """
    name, _ = repository_of(place, "model")
    repository = None
    if not dry_run:
        repository = Repository(place, "model", private=private, quiet=quiet)
    saved = named_checkpoint(checkpoint, trust=trust)
    run = saved.path.parent
    result, _ = measured_success(
        saved, None, None, episodes, workers=workers, trust=trust, quiet=quiet
    )
    played = watched_episodes(saved, episodes=_SHOWN_EPISODES, trust=trust, quiet=quiet)
    with working_folder(run / f".{saved.path.name}.push") as folder:
        files = write_policy(
            folder,
            settings=handed_on(saved.parsed()),
            words=saved.words,
            model=saved.model,
            versions=saved.versions,
            steps=saved.steps(),
        )
        figures = json.dumps(result.as_json(), indent=2) + "\n"
        for file, content in {
            EVALUATION_FILE: figures.encode(),
            GIF_FILE: watched_gif(list(_shown(played)), quiet=quiet),
        }.items():
            write_output(folder / file, content, overwrite=False)
            files.append(folder / file)
        with suppress(DemotoolsError):  # weights alone have no log beside them
            files.append(plot_runs([run], folder / CURVE_FILE))
        card = model_card(name, saved, result, licence, curve=files[-1].name == CURVE_FILE)
        write_output(folder / CARD, card.encode(), overwrite=False)
        files.append(folder / CARD)
        sizes = {file.name: file.stat().st_size for file in files}
        url = None
        if repository is not None:
            message = f"Add a policy for {result.level}: {result.success:.1%}"
            _, url = repository.commit({file.name: file for file in files}, message)
    return Pushed(sizes, url, result)


def _shown(played: Iterable[Watched]) -> Iterable[Watched]:
    """The first episodes, as many as make no long animation, at least one."""
    steps = 0
    for episode in played:
        if steps and steps + len(episode.probability) > _SHOWN_STEPS:
            return
        steps += len(episode.probability)
        yield episode


_CARD_TEXT = """\
---
{header}
---

# {title}

![The policy plays](policy.gif)

A network that plays the BabyAI level {level}: {parameters:,} weights, type `{network}`, which sees
7 x 7 cells before it and is told a mission in words.

## How well it plays

**{success:.1%} of {episodes:,} unseen episodes** (95% interval {low:.1%} to {high:.1%}): a reward
above 0 within the level's step limit, the most probable actions, environment seeds from
{first_seed:,} on. Episodes take {mean_length:.1f} steps on average.

| mission | success | episodes |
| --- | --- | --- |
{kinds}

`evaluation.json` has these figures, and `trainer evaluate hf:{name} --episodes {episodes}`
measures them again.

## Use

```python
import demotools
import trainer

policy = trainer.load_policy("hf:{name}")
environment = demotools.make_environment("{first_level}")
for seed in range(10):
    print(seed, policy.play(environment, seed=seed))  # the reward: above 0 for success
```

In a loop of your own, call `policy.reset()` after every `environment.reset()`; then
`policy.act(observation)` is the action.

In a checkout of demotools, `pip install -c constraints.txt '.[train,hf]'` installs what this needs.
`trainer watch hf:{name}` shows it play, `trainer run RECIPE --init-from hf:{name}` trains on from
these weights. The weights are safetensors, settings and vocabulary are TOML and JSON: nothing in
them is run.

## How it was trained

`settings.toml` is the whole recipe{steps}.
{curve}
Written with {versions}.
"""


def model_card(
    name: str, saved: Checkpoint, result: Evaluation, licence: str | None, *, curve: bool
) -> str:
    """The model card of a policy that is published as OWNER/NAME.

    curve   whether the picture of its learning curve lies beside it
    """
    settings, network = saved.parsed(), saved.network()
    low, high = result.interval
    title = f"{settings.run.name}"
    metric = {"type": "success_rate", "name": "success rate", "value": result.success}
    measured = {
        "task": {"type": "reinforcement-learning", "name": "reinforcement learning"},
        "dataset": {"type": f"BabyAI-{result.level}", "name": f"BabyAI {result.level}"},
        "metrics": [metric],
    }
    header = {
        "library_name": "demotools",
        "pipeline_tag": "reinforcement-learning",
        **({"license": licence} if licence else {}),
        "tags": ["babyai", "minigrid", "imitation-learning", "instruction-following"],
        "model-index": [{"name": title, "results": [measured]}],
    }
    kinds = {"demo_steps": "demonstration", "env_steps": "environment"}
    taken = [f"{count:,} {kinds[key]}" for key, count in (saved.steps() or {}).items()]
    rows = [
        f"| {printable_text(kind)} | {of.successes / of.episodes:.1%} | {of.episodes:,} |"
        for kind, of in result.kinds.items()
    ]
    return _CARD_TEXT.format(
        header="\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in header.items()),
        title=printable_text(title),
        name=name,
        level=printable_text(result.level),
        first_level=printable_text(settings.run.level_names[0]),
        network=printable_text(settings.model.type),
        parameters=parameter_count(network),
        success=result.success,
        episodes=result.episodes,
        low=low,
        high=high,
        first_seed=result.first_seed,
        mean_length=result.mean_length,
        kinds="\n".join(rows),
        steps=f": {' and '.join(taken)} steps" if taken else "",
        curve="\n![The learning curve](curve.png)\n" if curve else "",
        versions=", ".join(f"{key} {value}" for key, value in sorted(saved.versions.items())),
    )
