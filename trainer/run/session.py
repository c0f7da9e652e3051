"""Runs training from settings to a finished run (`train`)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from demotools.babyai.vocabulary import WORDS
from demotools.errors import CheckpointError, SettingsError
from demotools.output import counted, data_folder, written_whole
from demotools.recording.bot import can_play
from demotools.recording.environment import (
    Environment,
    environment_words,
    level_environment_id,
    view_and_actions,
)
from demotools.store.format import store_exists
from demotools.store.reading import Store, open_store, store_path
from trainer.acting.vector import check_named, check_playable
from trainer.data.augment import check_augmentation
from trainer.data.sources import StageSources, mixture_lines, shared_words, stage_sources
from trainer.learning.building import (
    NETWORKS,
    available_device,
    build_network,
    faster_precision,
)
from trainer.learning.networks.base import parameter_count
from trainer.run.checkpoint import Checkpoint, read_checkpoint
from trainer.run.cost import duration, expected_cost
from trainer.run.folder import (
    CHECKPOINT_FILE,
    claimed,
    has_checkpoint,
    left_by_a_run,
    run_folder,
)
from trainer.run.initial import (
    initial_checkpoint,
    initial_place,
    longest_words,
    network_of,
    take_weights,
)
from trainer.run.loop import run_stages
from trainer.run.memory import kept_memory
from trainer.run.resume import load_best, restore, resumed_settings
from trainer.run.state import Run, new_run, open_log, passes_of, stage_plan
from trainer.run.success import measure
from trainer.run.tracking import tracking_package
from trainer.settings.models import (
    AUTO_STORE,
    LEVELS,
    SETTINGS_FILE,
    Device,
    LevelSettings,
    ModelSettings,
    Settings,
    StoreSettings,
    parsed_settings,
    read_settings,
    recipe_path,
    toml_of,
)
from trainer.settings.user_code import (
    check_trusted,
    find,
    foreign_names,
    made_environment,
    recipe_note,
    search_noted_folders,
    search_recipe_folders,
    takes,
    users_code,
)
from trainer.team import (
    ALONE,
    Team,
    joined_team,
    limit_threads,
    processors_each,
    stop_request,
)

_SHOWN_WORDS = 12


class Stopped(SystemExit):
    """A signal ended the run, which is saved; the exit code says which signal.

    checkpoint   its file
    """

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(128 + number)
        self.checkpoint = checkpoint


def train(
    settings: Settings | Mapping[str, Any] | Path | str,
    *,
    output: Path | str | None = None,
    overrides: Sequence[str] = (),
    tiny: bool = False,
    data_dir: Path | str | None = None,
    workers: int | None = None,
    init_from: Path | str | None = None,
    resume: bool | Literal["auto"] = False,
    force_settings: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = print,
    on_save: Callable[[Path], object] = lambda _folder: None,
) -> Path:
    """Train with these settings; returns the run's folder, with its checkpoint, log and settings.

    settings         path or name of a recipe, or its content as a dict or a Settings object
    output           the folder; None: runs/NAME plus what the overrides change
    overrides        settings of a recipe to override, each as `a.b=value`
    tiny             whether to apply the recipe's own [tiny] overrides first
    data_dir         folder of the demo stores; None: $DEMOTOOLS_DATA, else the user's data folder
    workers          maximum number of environment processes; None: one per processor, or with
                     `tiny` only this one
    init_from        start from the weights of this checkpoint, or of this run's folder
    resume           resume from the checkpoint in the folder; "auto": if there is one
    force_settings   resume even if settings that do not affect the weights have changed
    overwrite        replace a run in the same folder
    trust            import the code that the settings name, even if they are a run's settings.toml
    quiet            print nothing, and show no progress bar
    say              called with each line for the user
    on_save          called with the folder after every checkpoint

    Progress is shown as a bar if stderr is a terminal, else as a line a minute from the logger
    `demotools` (`logging.basicConfig(level="INFO")` shows it).

    SettingsError, StoreError, CheckpointError  before anything is written
    Stopped                                     a signal ended the run; it can be resumed

    Usage:

        folder = trainer.train("bc_small_cpu", output="runs/first", overrides=["run.seed=3"])
        policy = trainer.load_policy(folder)
    """
    data = data_folder(Path(data_dir) if data_dir is not None else None)
    asked = _asked_for(settings, overrides, tiny, trust, init_from)
    folder = run_folder(
        asked.run.name,
        overrides,
        tiny=tiny,
        init_from=init_from,
        output=output,
        resume=resume is True,
    )
    # a run that goes on has the weights, the network and the words that it was begun with
    begun = read_checkpoint(folder, trust=True) if resume and has_checkpoint(folder) else None
    initial = _initial(asked) if begun is None else None
    if begun is not None and asked.run.precision == "auto":
        asked = asked.with_run(precision=begun.parsed().run.precision)
    chosen, lines = resolved(asked, data, begun or initial, trust=trust)
    with joined_team(chosen.run.device) as team:
        if quiet or not team.writes:
            say = _silence
        # machines and folders may be unlike: what stood for `auto` in the first holds for all
        chosen = team.gathered(chosen)[0]
        # to start processes takes longer than all that is tiny
        workers = 1 if tiny and workers is None else workers
        run = _new_run(chosen, folder, data, workers, team, begun or initial, quiet=quiet, say=say)
        run.on_save = on_save
        lines += [*_prepared(run, initial, str(settings)), f"folder: {folder}"]
        with _claimed(run, resume=resume, overwrite=overwrite) as checkpoint:
            if checkpoint is not None:
                more = resumed_settings(checkpoint, run.settings, forced=force_settings)
                run.settings, lines = more[0], lines + more[1]
            for line in lines:
                say(line)
            _trained(run, checkpoint)
    return folder


def _trained(run: Run, checkpoint: Checkpoint | None) -> None:
    """Train to the end and measure success; raises Stopped where a signal came first."""
    with open_log(run), stop_request() as stop, kept_memory():
        if run.team.writes:
            with written_whole(run.folder / SETTINGS_FILE) as stream:
                stream.write((recipe_note(run.settings) + toml_of(run.settings)).encode())
        if checkpoint is not None:
            restore(run, checkpoint)
            done = run.progress
            run.say(f"resumed at {done.demo_steps:,} demo steps, {done.env_steps:,} env steps")
        run_stages(run, stop)
        if stop.agreed(run.team):
            raise Stopped(stop.signal, run.folder / CHECKPOINT_FILE)
        if run.team.writes:
            run.say(f"trained for {duration(60 * run.progress.minutes)}")
            # all is saved, and measuring may take longer than there is time
            stop.at_once(partial(_evaluate, run))
            if stop:
                raise Stopped(stop.signal, run.folder / CHECKPOINT_FILE)


def dry_run(
    recipe: str,
    *,
    overrides: Sequence[str] = (),
    tiny: bool = False,
    data_dir: Path | None = None,
    workers: int | None = None,
    init_from: Path | str | None = None,
    trust: bool = False,
) -> str:
    """The resolved settings as TOML that runs again as it is; the cost in its comments."""
    data = data_folder(data_dir)
    asked = _asked_for(recipe, overrides, tiny, trust, init_from)
    initial = _initial(asked)
    settings, lines = resolved(asked, data, initial, trust=trust)
    if names := foreign_names(settings):
        stores = open_stores(settings, data)
        sources = stage_sources(settings, stores)
        lines += [*_remarks(settings, stores, sources), *_planned(settings, stores, sources, names)]
    else:
        run = _new_run(settings, Path(), data, workers, ALONE, initial)
        settings = run.settings
        lines += _prepared(run, initial, recipe)
    return "".join(f"# {line}\n" for line in lines) + toml_of(settings)


def _silence(_line: str) -> None:
    """For a run that says nothing."""


def _asked_for(
    source: Settings | Mapping[str, Any] | Path | str,
    overrides: Sequence[str],
    tiny: bool,
    trust: bool,
    init_from: Path | str | None,
) -> Settings:
    """The settings that the user gives, `auto` and all."""
    if isinstance(source, Settings):
        settings = source
    elif isinstance(source, Mapping):
        settings = parsed_settings(dict(source), "the settings given to train()")
    else:
        settings = read_settings(str(source), overrides, tiny=tiny)
        path = recipe_path(str(source))
        if path.name == SETTINGS_FILE:
            check_trusted(settings, path, trust=trust)
        search_recipe_folders([str(path.resolve().parent)])
        if trust:
            search_noted_folders(path.parent)
    name = str(init_from) if init_from is not None else settings.run.init_from
    return settings if name is None else settings.with_run(init_from=initial_place(name))


def _initial(settings: Settings) -> Checkpoint | None:
    name = settings.run.init_from
    return None if name is None else initial_checkpoint(name)


def _new_run(
    settings: Settings,
    folder: Path,
    data: Path,
    workers: int | None,
    team: Team,
    known: Checkpoint | None,
    *,
    quiet: bool = True,
    say: Callable[[str], None] = _silence,
) -> Run:
    """The run, its settings checked against what there is: levels, stores, packages."""
    limit_threads()
    new, environments = list(settings.model.words or ()), _environments(settings)
    with users_code("on_policy.environment", settings.environment):
        settings = _fitted(settings, environments)
        for level, environment in environments.items():
            if settings.model.words is None and not _is_babyai(settings, level):
                new += environment_words(environment)
    for key in settings.run.projects():
        tracking_package(key)
    stores = open_stores(settings, data)
    _check_views(settings, stores)
    words = shared_words(list(stores.values()))
    if known is not None:
        words = longest_words(words, known)
    words += tuple(word for word in dict.fromkeys(new) if word not in words)
    run = new_run(
        *(settings, stores, words, folder, team),
        workers=workers or processors_each(),
        quiet=quiet,
        say=say,
    )
    for number, stage in enumerate(settings.stages):
        if what := run.asks_expert(stage):
            _check_experts(environments, what, f"stages.{number}")
    for environment in environments.values():
        environment.close()
    return run


def _environments(settings: Settings) -> dict[str, Environment]:
    """One of each level that is played, in training or to measure success."""
    played = settings.on_policy is not None or settings.evaluation is not None
    names = settings.run.level_names if played else ()
    for level in names if settings.environment == LEVELS else ():
        check_playable(level)
    return {level: made_environment(settings.environment, level) for level in names}


def _check_experts(environments: Mapping[str, Environment], what: str, key: str) -> None:
    """SettingsError where there is no expert for one of the levels, which `what` asks."""
    for level, environment in environments.items():
        if not can_play(environment):
            raise SettingsError(
                f"{what} needs an expert, but none plays {level}: the bot plays BabyAI's levels, "
                "the search expert minigrid's with a goal, an object to fetch, or a door",
                path=key,
                fix="remove it, or choose another level",
            )


def _prepared(run: Run, initial: Checkpoint | None, recipe: str) -> list[str]:
    """Give a new run its first weights, and work out its cost; what there is to say of it."""
    # refusals come before anything is tried
    lines = _remarks(run.settings, run.stores, run.sources)
    beyond = [word for word in run.words if word not in WORDS]
    if beyond:
        shown = ", ".join(beyond[:_SHOWN_WORDS]) + (", …" if len(beyond) > _SHOWN_WORDS else "")
        lines.append(f"{counted(len(beyond), 'word')} beyond BabyAI's: {shown}")
    if initial is not None:
        lines.append(take_weights(run, initial))
    return lines + expected_cost(run).lines(recipe)


def _remarks(settings: Settings, stores: Mapping[str, Store], sources: StageSources) -> list[str]:
    """What there is to say of losses and stores; a mixture or augmentation may be refused here."""
    lines = other_levels(settings, stores)
    used = {name for stage in settings.stages for name in stage.loss_names}
    lines += [f"no stage uses losses.{name}" for name in settings.losses if name not in used]
    for stage, played in zip(settings.stages, sources, strict=True):
        shown = stage.off_policy
        if shown is None or shown.iterator is not None:
            continue
        if len(played) > 1 or shown.store[0].filters:
            lines += mixture_lines(played, shown.rollouts)
    if any(stage.off_policy and stage.off_policy.augment for stage in settings.stages):
        lines += check_augmentation(settings, stores)
    return list(dict.fromkeys(lines))


def _planned(
    settings: Settings, stores: Mapping[str, Store], sources: StageSources, names: list[str]
) -> list[str]:
    """What there is to know of a run without importing the code that its settings name."""
    lines = [
        f"not imported in a dry run: {', '.join(names)}",
        "time and memory: unknown without importing these",
    ]
    if settings.model.type in NETWORKS:
        count = len({*shared_words(list(stores.values())), *(settings.model.words or ())})
        network = build_network(settings.model.type, settings.model.options, count)
        lines.append(f"parameters: {parameter_count(network):,}")
    for number, (stage, played) in enumerate(zip(settings.stages, sources, strict=True)):
        plan = stage_plan(stage, settings.on_policy)
        text = plan.text(passes_of(stage, plan, played))
        lines.append(f"stage {number + 1} of {len(settings.stages)}: {text}")
    return lines


def _fitted(settings: Settings, environments: Mapping[str, Environment]) -> Settings:
    """The settings with a network for what the levels show and how many actions they take.

    SettingsError  the network does not say that it takes them, or is built for others; or the
                   levels differ in them
    LevelError     its actions have no names, and episodes are to be drawn
    """
    model, wanted = settings.model, dict[str, Any]()
    kinds = {level: view_and_actions(one, level) for level, one in environments.items()}
    for level, (view, actions) in list(kinds.items())[:1]:
        if view != model.view:
            wanted["view"] = list(view)
        if actions != model.actions:
            wanted["actions"] = actions
        for key in wanted:
            _check_takes(model, key, wanted[key], level)
        if settings.evaluation is not None and settings.evaluation.gifs:
            check_named(actions, level)
        for other in kinds:
            if kinds[other] != kinds[level]:
                raise SettingsError(
                    "one network cannot play all of these levels: "
                    f"{level} has {_kind_text(*kinds[level])}, {other} {_kind_text(*kinds[other])}",
                    path="run.level",
                    fix="train only on levels that agree, or wrap the others",
                )
    return settings.model_copy(update={"model": model.model_copy(update=wanted)})


def _kind_text(view: tuple[int, ...], actions: int) -> str:
    return f"views of {' x '.join(map(str, view))} and {actions} actions"


def _check_takes(model: ModelSettings, key: str, value: Any, level: str) -> None:
    """SettingsError where a network cannot be built for a level's `view` or `actions`."""
    shown = " x ".join(map(str, value)) if key == "view" else str(value)
    if key in model.options:
        raise SettingsError(
            f"the network is built for model.{key} = {model.options[key]}, but {level} has {shown}",
            path=f"model.{key}",
            fix="remove it; the value is taken from the environment",
        )
    if not takes(find("model.type", model.type, NETWORKS), key):
        kind = "views of 7 x 7 cells" if key == "view" else "7 actions"
        raise SettingsError(
            f"the network `{model.type}` takes {kind}, but {level} has {shown}",
            path=f"model.type = {model.type!r}",
            fix="use `small` or `film`, which accept others, or your own network with a "
            f"parameter `{key}`",
        )


def _check_views(settings: Settings, stores: Mapping[str, Store]) -> None:
    """SettingsError where a network of ours is built for other views than those of a store."""
    wanted = settings.model.view
    for name, store in stores.items():
        shown = tuple(store.view.shape[1:])
        if settings.model.type in NETWORKS and shown != wanted:
            raise SettingsError(
                f"the network `{settings.model.type}` is built for views of "
                f"{' x '.join(map(str, wanted))}, but the store {name} shows "
                f"{' x '.join(map(str, shown))}",
                path="model.type",
                fix="train on another store, or use your own network",
            )


def _is_babyai(settings: Settings, level: str) -> bool:
    """Whether a level is one of BabyAI's, whose words all networks have."""
    ours = settings.environment == LEVELS and ":" not in level
    return ours and level_environment_id(level).startswith("BabyAI-")


def _checkpoint_to_resume(folder: Path) -> Checkpoint:
    if not (folder / CHECKPOINT_FILE).is_file():
        raise CheckpointError(
            "there is no checkpoint to resume from",
            path=folder / CHECKPOINT_FILE,
            fix="use --resume=auto, or --overwrite instead of --resume: the run ended before its "
            "first checkpoint"
            if left_by_a_run(folder)
            else "drop --resume to start the run, or name the folder of the run with -o",
        )
    # what runs is named by the recipe; `resumed_settings` refuses a checkpoint that names others
    return read_checkpoint(folder, trust=True)


@contextmanager
def _claimed(
    run: Run, *, resume: bool | Literal["auto"], overwrite: bool
) -> Iterator[Checkpoint | None]:
    """The folder of a run, in order and nobody else's inside; the checkpoint to resume from."""
    folder = run.folder
    if resume == "auto":
        resume = run.team.gathered(has_checkpoint(folder))[0]
        overwrite = not resume  # what ended before its first checkpoint is begun again
    if resume and not folder.is_dir():
        _checkpoint_to_resume(folder)  # says that there is none, before a folder is made
    mine = claimed(folder, new=not resume, overwrite=overwrite)
    with mine if run.team.writes else nullcontext():
        yield _checkpoint_to_resume(folder) if resume else None


def _evaluate(run: Run) -> None:
    """Measure success where the settings ask for it, and note it in the log."""
    if run.settings.evaluation is None or run.log is None:
        return
    if line := load_best(run):
        run.say(line)
    measure(run)


_NETWORKS = {
    "cpu": ("small", "the 0.6 M-parameter one designed for CPUs"),
    "cuda": ("big", "the tutorial's 20 M-parameter one, because there is a GPU"),
    "mps": ("small", "the 0.6 M-parameter one; choose another with model.type"),
}


def resolved(
    settings: Settings, folder: Path, known: Checkpoint | None = None, *, trust: bool = False
) -> tuple[Settings, list[str]]:
    """The settings without any `auto`, and one line for each choice that was made.

    folder   of the demo stores
    known    whose network `auto` stands for; None: by the device
    trust    whether code that this network is made of is run
    """
    device, reasons = available_device(settings.run.device, "run.device"), []
    if settings.run.device == "auto":
        found = "a" if device == "cuda" else "no"
        reasons.append(f"device: {device}, because torch finds {found} GPU")
    model = settings.model
    if model.type == "auto" and known is not None:
        network, reason = network_of(known, trust=trust)
        model = network.model_copy(update={**model.options, "words": model.words})
        reasons.append(reason)
    elif model.type == "auto":
        kind, what = _NETWORKS[device]
        model = model.model_copy(update={"type": kind})
        reasons.append(f"network: {kind}, {what} (device: {device})")
    stages, automatic = [], []
    for number, stage in enumerate(settings.stages):
        played = stage.off_policy
        if played is not None and played.store == AUTO_STORE:
            stores: tuple[StoreSettings, ...] = ()  # an iterator of the user's has its own
            if played.iterator is None:
                stores = _stores_of(settings.run.levels, folder, device)
                automatic.append(f"stages.{number}.off_policy.store")
            played = played.model_copy(update={"store": stores})
        stages.append(stage.model_copy(update={"off_policy": played}))
    if automatic:
        reasons.append(_why_stores(settings.run.levels, folder, device, automatic))
    precision = settings.run.precision
    if precision == "auto":
        precision, reason = faster_precision(device)
        reasons.append(reason)
    settings = settings.with_run(device=device, precision=precision)
    settings = settings.model_copy(update={"model": model, "stages": tuple(stages)})
    return settings, list(dict.fromkeys(reasons))


def _stores_of(
    levels: Sequence[LevelSettings], folder: Path, device: Device
) -> tuple[StoreSettings, ...]:
    """What `auto` stands for as a stage's store: those of the run's levels."""
    stores = []
    for level in levels:
        full = _without_module(level.name)
        small = f"{full}-small"
        there = device != "cuda" and store_exists(store_path(small, folder))
        name = small if there else full
        stores.append(StoreSettings(name=name, proportion=level.proportion))
    return tuple(stores)


def _why_stores(
    levels: Sequence[LevelSettings], folder: Path, device: Device, keys: Sequence[str]
) -> str:
    """What there is to say of these stores; `keys` are the settings that they stand in for."""
    stores, reasons = _stores_of(levels, folder, device), []
    for level, store in zip(levels, stores, strict=True):
        why = "because there is no GPU"
        if store.name == _without_module(level.name):
            found = "a GPU" if device == "cuda" else f"no {store.name}-small"
            why = f"the full store, because there is {found}"
        reasons.append(f"store: {store.name}, {why}")
    if [_without_module(level.name) for level in levels] != [store.name for store in stores]:
        full = _without_module(levels[0].name)
        if len(levels) > 1:
            full = f"[{', '.join(map(_inline, levels))}]"
        changes = " ".join(f"--set {shlex.quote(f'{key}={full}')}" for key in keys)
        reasons.append(f"{changes} uses the full store{'s' * (len(levels) > 1)}")
    return "; ".join(reasons)


def _without_module(level: str) -> str:
    """The name that a level's stores have, also of one that a module registers: `module:Id-v0`."""
    return level.rpartition(":")[2]


def _inline(level: LevelSettings) -> str:
    """A level as the store of its name, in TOML."""
    name = json.dumps(_without_module(level.name))
    return name if level.proportion == 1 else f"{{name={name}, proportion={level.proportion}}}"


def open_stores(settings: Settings, folder: Path) -> dict[str, Store]:
    """The stores of all stages, by name; StoreError where one is missing or damaged."""
    return {name: open_store(store_path(name, folder)) for name in settings.store_names()}


def other_levels(settings: Settings, stores: Mapping[str, Store]) -> list[str]:
    """One line for each store whose demonstrations are of another level than the run's.

    That is a choice; missions with words that the run has not learned are refused where they are
    played.
    """
    levels = settings.run.level_names
    return [
        f"another level: the store {name} is of {', '.join(store.levels)}, but success is measured "
        f"on {', '.join(levels)}; set run.level="
        f"{json.dumps(store.levels) if store.attributes.levels else store.level} "
        "to measure it on the same"
        for name, store in stores.items()
        if not {*store.levels, store.attributes.environment_id} & set(map(_without_module, levels))
    ]
