"""Settings: a TOML file becomes frozen, typed objects here and nowhere else (docs/training.md).

A `type` is one of the trainer's own or the user's `package.module:Name`; the other keys of its
section are the arguments that it is built with (`trainer.settings.user_code`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import tomli_w
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from demotools.babyai.cells import ACTIONS, VIEW_SIZE
from demotools.babyai.levels import MOST_EPISODES, Symmetry
from demotools.babyai.vocabulary import mission_words
from demotools.errors import MISSING, SettingsError
from demotools.output import read_regular
from trainer.settings.built_in import KEYS, part_problems
from trainer.settings.refusals import UNKNOWN, nearest, pydantic_problems, refusal

_MOST_STEPS_AT_ONCE = 2**24


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("it must be a number")
    return value


Number = BeforeValidator(_no_truth)
Steps = Annotated[int, Number, Field(gt=0, le=10**15)]
"""A budget, or an interval of one."""
Count = Annotated[int, Number, Field(gt=0, le=1_000_000)]
Finite = Annotated[float, Number, Field(allow_inf_nan=False)]
Share = Annotated[Finite, Field(ge=0, le=1)]
Truth = Annotated[bool, Field(strict=True)]
Device = Literal["auto", "cpu", "cuda", "mps"]
SETTINGS_FILE = "settings.toml"
"""What a run writes its settings to, in its folder."""
Axis = Literal["env_steps", "demo_steps"]
"""Whose steps are counted: taken in environments, or shown from a store."""
LEVELS = "demotools.recording.environment:make_environment"
"""What makes the environments of BabyAI's levels, by name."""
_ON_POLICY = ("ppo", "a2c")
"""Losses of what the policy did itself, which no store holds."""
SUBGOALS = "subgoal_cross_entropy"
"""The loss of the bot's subgoals, which only stores hold."""
OF_EXPERTS = ("expert_cross_entropy", SUBGOALS)
"""Losses that copy an expert, and leave the critic alone."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Named(BaseModel):
    """Something that is built by its `type`, with the other keys as arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside `type`."""
        return dict(self.model_extra or {})


def _one_word(text: str) -> str:
    if mission_words(text) != [text]:
        raise ValueError("it must be one lower-case word, as in missions")
    return text


class ModelSettings(Named):
    """A network.

    words   of missions beyond those of BabyAI and of the stores; None: the environment's
    """

    words: tuple[Annotated[str, AfterValidator(_one_word)], ...] | None = None

    @property
    def view(self) -> tuple[int, ...]:
        """What it sees: (H, W) of cells, or (H, W, C) of an image."""
        return tuple(self.options.get("view", (VIEW_SIZE, VIEW_SIZE)))

    @property
    def actions(self) -> int:
        """How many actions it chooses among."""
        return int(self.options.get("actions", len(ACTIONS)))


def _plain(name: str) -> str:
    """The name of a run, which is that of its folder."""
    strange = not name.isprintable() or name != name.strip() or set(name) & set("/\\")
    if strange or name in ("", ".", "..") or len(name.encode()) > 200:
        raise ValueError("it must be a short name without slashes")
    return name


PlainName = Annotated[str, AfterValidator(_plain)]


def _check_size(what: str, rows: int, steps: int) -> None:
    if rows * steps > _MOST_STEPS_AT_ONCE:
        raise ValueError(
            f"{what} x rollout_len is {rows * steps:,} steps at once; "
            f"the limit is {_MOST_STEPS_AT_ONCE:,}"
        )


def _names_as_tables(value: Any) -> list[Any]:
    """Something by its name or a table, or a list of them: a list of tables."""
    items = value if isinstance(value, list | tuple) else [value]
    return [{"name": item} if isinstance(item, str) else item for item in items]


Proportion = Annotated[Finite, Field(gt=0, validation_alias=AliasChoices("proportion", "weight"))]


class LevelSettings(_Frozen):
    """A level, and its share of the environments."""

    name: Annotated[str, Field(min_length=1, validation_alias=AliasChoices("name", "level"))]
    proportion: Proportion = 1.0


class StoreSettings(_Frozen):
    """A store, its share of the rollouts, and which of its episodes are played; all limits count.

    mission   a regular expression to be found in the mission
    """

    name: Annotated[str, Field(min_length=1, validation_alias=AliasChoices("name", "store"))]
    proportion: Proportion = 1.0
    mission: str | None = None
    min_length: Annotated[
        Count | None, Field(validation_alias=AliasChoices("min_length", "shortest"))
    ] = None
    max_length: Annotated[
        Count | None, Field(validation_alias=AliasChoices("max_length", "longest"))
    ] = None
    min_seed: Annotated[int, Number] | None = None
    max_seed: Annotated[int, Number] | None = None

    @property
    def filters(self) -> dict[str, Any]:
        """What limits the episodes."""
        return self.model_dump(exclude_none=True, exclude={"name", "proportion"})


AUTO_STORE = (StoreSettings(name="auto"),)
"""Of the run's levels, see `store` in docs/settings.md; beside an iterator of the user's: none."""


def _as_written(parts: tuple[LevelSettings | StoreSettings, ...]) -> object:
    """A single one of which nothing else is said by its name, as people write it."""
    if len(parts) == 1 and parts[0] == type(parts[0])(name=parts[0].name):
        return parts[0].name
    return [part.model_dump(exclude_none=True) for part in parts]


def _different(levels: tuple[LevelSettings, ...]) -> tuple[LevelSettings, ...]:
    if not levels:
        raise ValueError("there is no level: name at least one")
    if len({level.name for level in levels}) < len(levels):
        raise ValueError("a level is listed twice: list it once, with one proportion")
    return levels


class RunSettings(_Frozen):
    """What is trained, and how often it is saved."""

    name: PlainName
    levels: Annotated[
        tuple[LevelSettings, ...],
        BeforeValidator(_names_as_tables),
        AfterValidator(_different),
        PlainSerializer(_as_written),
        Field(validation_alias=AliasChoices("level", "levels"), serialization_alias="level"),
    ]
    seed: Annotated[int, Number, Field(ge=0, lt=2**32)] = 0
    device: Device = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    compile: Truth = False
    deterministic: Truth = False
    init_from: Annotated[str, Field(min_length=1)] | None = None
    ema: Annotated[Finite, Field(gt=0, lt=1)] | None = None
    save_every_env_steps: Steps | None = None
    save_every_demo_steps: Steps | None = None
    keep: Count = 1
    wandb: str | None = None
    mlflow: str | None = None
    trackio: str | None = None

    @property
    def level(self) -> str:
        """The first, or the only one."""
        return self.levels[0].name

    @property
    def level_names(self) -> tuple[str, ...]:
        """Of all levels."""
        return tuple(level.name for level in self.levels)

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if self.save_every_env_steps and self.save_every_demo_steps:
            raise ValueError("give save_every_env_steps or save_every_demo_steps, not both")
        return self

    def projects(self) -> dict[str, str]:
        """The projects of other programs that get the log too, by their key here."""
        named = {"wandb": self.wandb, "mlflow": self.mlflow, "trackio": self.trackio}
        return {key: name for key, name in named.items() if name is not None}


class OptimizerSettings(Named):
    """A torch optimizer, the schedule of its learning rate, and the largest gradient norm."""

    type: str = "adam"
    lr: Annotated[Finite, Field(gt=0, le=1000)]
    max_grad_norm: Annotated[Finite, Field(gt=0)] | None = None
    schedule: Named = Named(type="constant")


class OnPolicySettings(_Frozen):
    """Environment rollouts, which track success and feed the on-policy losses.

    environment   `package.module:make`, called with the level
    """

    environments: Annotated[Count, Field(le=10_000)]
    rollout_len: Count
    gamma: Share = 0.99
    gae_lambda: Share = 1.0
    normalise_advantages: Truth = True
    environment: str = LEVELS


def _weights(value: object) -> object:
    """A list of names is each with weight 1."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError('it must be names of losses, like `["ppo"]` or `{ppo = 1.0}`')
    return dict.fromkeys(value, 1.0)


Weights = Annotated[dict[str, Finite], BeforeValidator(_weights)]
"""Weight of each loss by its name; a list gives each the weight 1."""


def _named(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value


class OffPolicySettings(_Frozen):
    """Batches from demo stores.

    iterator   what gives the batches in place of ours; it gets the stores, which may be none
    """

    store: Annotated[
        tuple[StoreSettings, ...],
        BeforeValidator(_names_as_tables),
        PlainSerializer(_as_written),
        Field(validation_alias=AliasChoices("store", "stores")),
    ] = AUTO_STORE
    iterator: Annotated[Named, BeforeValidator(_named)] | None = None
    rollouts: Count
    rollout_len: Count
    updates: Count = 16
    losses: Annotated[Weights, Field(min_length=1)]
    augment: tuple[Symmetry, ...] = ()
    shuffle: Literal["full", "windowed"] = "full"

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        _check_size("rollouts", self.rollouts, self.rollout_len)
        if not self.store and self.iterator is None:
            raise ValueError("there is no store: name at least one")
        if self.iterator is not None and (self.augment or self.shuffle != "full"):
            raise ValueError(
                "augment and shuffle belong to the trainer's own iterator: write `augment = []`, "
                "remove shuffle, and do this in yours"
            )
        if self.iterator is not None and any(one.filters for one in self.store):
            raise ValueError("an iterator of your own gets whole stores: filter them there")
        return self

    @property
    def batch_steps(self) -> int:
        """Steps of one batch."""
        return self.rollouts * self.rollout_len


class TeacherForcing(_Frozen):
    """How probable it is that the expert acts in the policy's place, over steps of the stage."""

    start: Annotated[Share, Field(alias="from")] = 1.0
    stop: Annotated[Share, Field(alias="to")] = 0.0
    steps: Steps

    def probability(self, stage_steps: int) -> float:
        """After so many environment steps of the stage.

        >>> forcing = TeacherForcing.model_validate({"from": 1, "to": 0, "steps": 10_000})
        >>> [forcing.probability(steps) for steps in (0, 2500, 10_000, 99_999)]
        [1.0, 0.75, 0.0, 0.0]
        """
        return self.start + (self.stop - self.start) * min(stage_steps / self.steps, 1.0)


class EarlyStopping(_Frozen):
    """When a stage ends before its budget: by success, or by patience.

    success          of the last `episodes` episodes of training
    patience         cycles without a better cross-entropy on the store `hold_out`
    hold_out_steps   so many of its steps, always the same; None: all
    """

    success: Annotated[Share, Field(gt=0)] | None = None
    episodes: Annotated[Count, Field(le=1000)] = 500
    patience: Count | None = None
    hold_out: str | None = None
    hold_out_steps: Steps | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.success is None) == (self.patience is None):
            raise ValueError("give exactly one of success and patience")
        if (self.patience is None) != (self.hold_out is None):
            raise ValueError("patience and hold_out (the store it watches) go together")
        if self.hold_out_steps and self.hold_out is None:
            raise ValueError("hold_out_steps needs hold_out, the store whose steps are used")
        return self


class StageSettings(_Frozen):
    """A stage of training, up to its budget.

    rollout_len   of this stage's environment rollouts; None: that of the section on_policy
    """

    max_env_steps: Steps | None = None
    max_demo_steps: Steps | None = None
    losses: Weights = Field(default_factory=dict)
    rollout_len: Count | None = None
    repeats: Count = 1
    minibatches: Count = 1
    teacher_forcing: TeacherForcing | None = None
    early_stopping: EarlyStopping | None = None
    off_policy: OffPolicySettings | None = None

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses that it uses, on what was played and on stores."""
        return (*self.losses, *(self.off_policy.losses if self.off_policy else ()))

    @property
    def axis(self) -> Axis:
        """The steps that its budget counts."""
        return "env_steps" if self.max_env_steps else "demo_steps"

    @property
    def budget(self) -> int:
        """So many of them."""
        return self.max_env_steps or self.max_demo_steps or 0

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.max_env_steps is None) == (self.max_demo_steps is None):
            raise ValueError("give exactly one of max_env_steps and max_demo_steps")
        if self.max_demo_steps and self.off_policy is None:
            raise ValueError("max_demo_steps needs a section off_policy, whose steps it counts")
        return self


class EvaluationSettings(_Frozen):
    """The measurement of success: after the last stage, and while it trains.

    every    so many steps of what a stage's budget counts; None: after the last stage only
    sample   whether actions are drawn from the policy's probabilities, only in "loops", or "both"
             always and never; None: both where a stage learns from its own rollouts, else the
             most probable actions alone
    gifs     so many of the episodes of each measurement and level are drawn
    """

    episodes: Annotated[int, Number, Field(gt=0, le=MOST_EPISODES)] = 1000
    every: Steps | None = None
    sample: Truth | Literal["both", "loops"] | None = None
    gifs: Annotated[
        int | None, Number, Field(ge=0, le=100, validation_alias=AliasChoices("gifs", "videos"))
    ] = None


class Settings(_Frozen):
    """A whole training file."""

    run: RunSettings
    model: ModelSettings = ModelSettings(type="auto")
    optimizer: OptimizerSettings
    on_policy: OnPolicySettings | None = None
    losses: dict[str, Named] = Field(default_factory=dict)
    stages: Annotated[tuple[StageSettings, ...], Field(min_length=1)]
    evaluation: EvaluationSettings | None = None

    @property
    def environment(self) -> str:
        """What makes the environments."""
        return self.on_policy.environment if self.on_policy is not None else LEVELS

    def tree(self) -> dict[str, Any]:
        """All that is set, as TOML has it."""
        return self.model_dump(exclude_none=True, mode="json", by_alias=True)

    def with_run(self, **changed: Any) -> Self:
        """The same with other values in the section `run`."""
        return self.model_copy(update={"run": self.run.model_copy(update=changed)})

    def store_names(self) -> list[str]:
        """The stores that the stages play, and those that they watch, each once."""
        names = []
        for stage in self.stages:
            shown = stage.off_policy
            if shown and (shown.iterator is None or shown.store != AUTO_STORE):
                names += [store.name for store in shown.store]
            watched = stage.early_stopping and stage.early_stopping.hold_out
            names += [watched] if watched else []
        return list(dict.fromkeys(names))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for number, stage in enumerate(self.stages):
            for name in stage.loss_names:
                if name not in self.losses:
                    raise ValueError(
                        f"stages.{number} uses the loss `{name}`, which is not defined"
                        f"{nearest(name, self.losses, 'the losses are')}"
                    )
            tracks = stage.early_stopping and stage.early_stopping.success
            needs = stage.losses or stage.max_env_steps or stage.teacher_forcing or tracks
            if needs and self.on_policy is None:
                raise ValueError(f"stages.{number} needs the section on_policy")
            self._check_places(number, stage)
            rows = self.on_policy.environments if self.on_policy else 0
            if self.on_policy:
                steps = stage.rollout_len or self.on_policy.rollout_len
                _check_size("on_policy.environments", rows, steps)
            if stage.losses and stage.minibatches > rows:
                raise ValueError(
                    f"stages.{number}.minibatches must be at most on_policy.environments ({rows}), "
                    "because each gets whole environments"
                )
        return self

    def _check_places(self, number: int, stage: StageSettings) -> None:
        """That each loss stands where there is what it learns from."""
        key = f"stages.{number}"
        for name in stage.off_policy.losses if stage.off_policy else ():
            if self.losses[name].type in _ON_POLICY:
                raise ValueError(
                    f"the loss `{name}` of type {self.losses[name].type} learns from "
                    f"environment rollouts: list it in {key}.losses"
                )
        for name in stage.losses:
            if self.losses[name].type == SUBGOALS:
                raise ValueError(
                    f"the loss `{name}` of type {SUBGOALS} learns from stores: list it in "
                    f"{key}.off_policy.losses"
                )


def read_settings(recipe: str, overrides: Iterable[str] = (), *, tiny: bool = False) -> Settings:
    """The settings of a recipe: a path, else the name of one that ships.

    overrides      `a.b=value` each; `stages.0.x=1` reaches into a list, `a.b=` removes a key
    tiny           whether the recipe's own overrides in `[tiny]` come first

    SettingsError  there is no such recipe, it is not TOML, a key is unknown, a value is wrong
    """
    path = recipe_path(recipe)
    tree = toml_tree(read_regular(path), path)
    small = tree.pop("tiny", {})
    if not isinstance(small, dict):
        raise SettingsError(
            "`tiny` is not a section", path=path, fix="write `[tiny]`, with keys below it"
        )
    if tiny and not small:
        raise SettingsError(
            "this recipe has no section [tiny], so --tiny would train in full",
            path=path,
            fix='add one, like `[tiny]` and `"stages.0.max_demo_steps" = 1000`, or drop --tiny',
        )
    overrides, given = list(overrides), dict[str, str]()
    others = any(re.match(r"\s*model\.type\s*=.*:", text) for text in overrides)
    for key, value in small.items() if tiny else ():
        if others and key.startswith("model."):
            continue  # the sizes of the recipe's own network
        set_key(tree, key, value)
        given[key] = f"{path}, in the section [tiny]"
    for text in overrides:
        given[override(tree, text)] = f"--set {text}"
    return parsed_settings(tree, path, given, parts=True)


def parsed_settings(
    tree: dict[str, Any],
    path: Path | str,
    given: Mapping[str, str] | None = None,
    *,
    parts: bool = False,
) -> Settings:
    """Settings of parsed TOML; SettingsError names all wrong keys and, where unknown, the nearest.

    given   where keys come from that are not from the file at `path`
    parts   whether names of built-in parts, and the keys beside them, are checked too
    """
    settings, problems = None, []
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        problems = pydantic_problems(error, tree, _keys_beside, _all_keys())
    strange = list(part_problems(_parts(tree))) if parts else []
    # a required key that is misspelt is not missing, too
    beside = {one.key.rpartition(".")[0] for one in strange if one.what == UNKNOWN}
    problems = [
        one for one in problems if one.what != MISSING or one.key.rpartition(".")[0] not in beside
    ]
    problems += strange
    if settings is None or problems:
        raise refusal(problems, path, given or {})
    return settings


def _parts(tree: Mapping[str, Any]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """All that has a `type`, with the keys beside it, by the setting that names it."""
    losses, optimizer = tree.get("losses"), tree.get("optimizer")
    named = {"model": tree.get("model"), "optimizer": optimizer}
    if isinstance(optimizer, dict):
        named["optimizer"] = {"type": OptimizerSettings.model_fields["type"].default, **optimizer}
        named["optimizer.schedule"] = optimizer.get("schedule")
    if isinstance(losses, dict):
        named |= {f"losses.{name}": loss for name, loss in losses.items()}
    of_ours = {"optimizer": OptimizerSettings.model_fields.keys()}
    return {
        f"{key}.type": (
            part["type"],
            {name: one for name, one in part.items() if name not in of_ours.get(key, ("type",))},
        )
        for key, part in named.items()
        if isinstance(part, dict) and isinstance(part.get("type"), str)
    }


def toml_of(settings: Settings) -> str:
    """The settings as a TOML file that runs again as it is."""
    return tomli_w.dumps(settings.tree())


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship, by file name."""
    folder = Path(str(files("trainer") / "recipes"))
    return {path.name: path for path in sorted(folder.glob("*.toml"))}


def recipe_summary(path: Path) -> str:
    """The first line of a recipe's header comment, but for the schema's."""
    lines = path.read_text("utf-8").splitlines()
    first = next((line for line in lines if not line.startswith("#:")), "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def recipe_path(recipe: str) -> Path:
    """The file of a recipe: a path, else the name of one that ships; SettingsError otherwise."""
    if Path(recipe).suffix == ".pt" and Path(recipe).is_file():
        raise SettingsError(
            "this is a checkpoint, not a recipe",
            path=recipe,
            fix=f"to measure it: trainer evaluate {recipe}; to begin with its weights: trainer run "
            f"RECIPE --init-from {recipe}",
        )
    if Path(recipe).is_file():
        return Path(recipe)
    shipped = shipped_recipes()
    name = recipe if recipe.endswith(".toml") else f"{recipe}.toml"
    if name in shipped:
        return shipped[name]
    if (settings := Path(recipe) / SETTINGS_FILE).is_file():
        raise SettingsError(
            "this is the folder of a run, not a recipe",
            path=recipe,
            fix=f"to continue it: trainer run {settings} -o {recipe} --resume",
        )
    if Path(recipe).exists():
        return Path(recipe)  # a folder or a pipe, which is refused where it is opened
    raise SettingsError(
        "there is no such recipe",
        path=recipe,
        fix=f"give a path, or a name from `trainer recipes`{nearest(name, shipped, 'they are')}",
    )


def _keys_beside(location: Sequence[str]) -> list[str]:
    """The keys of the section that a wrong key stands in."""
    fields = _fields(Settings)
    for part in location[:-1]:
        if part in fields:
            below = next(iter(_models(fields[part].annotation)), None)
            fields = fields if below is None else _fields(below)
    return list(fields)


def _all_keys() -> list[str]:
    """Those of all sections, and what a network of ours may be given."""
    of_networks = dict.fromkeys(name for keys in KEYS["network"].values() for name in keys)
    return [*_keys_below(Settings), *(f"model.{name}" for name in of_networks)]


def _keys_below(section: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for key, field in _fields(section).items():
        yield f"{prefix}{key}"
        item = "0." if get_origin(field.annotation) is tuple else ""
        for below in _models(field.annotation):
            yield from _keys_below(below, f"{prefix}{key}.{item}")


def _fields(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section by their keys in TOML."""
    return {
        field.serialization_alias or name: field for name, field in section.model_fields.items()
    }


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def toml_tree(content: bytes | str, path: Path | str) -> dict[str, Any]:
    """What a TOML file says; SettingsError where it is not TOML.

    path   of the file, for the message
    """
    try:
        # what is no text could not be written again
        content = content.encode() if isinstance(content, str) else content
        return tomllib.loads(content.decode())
    # besides its own, tomllib lets through what int() says of thousands of digits
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"the recipe is not valid TOML: {error}", path=path, fix="correct the file"
        ) from error


def setting_leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """`a.b` and `a.0.b` of a tree to the values there."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {path: tree}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= setting_leaves(value, f"{path}.{key}" if path else str(key))
    return leaves


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ between two of what `setting_leaves` gives, sorted."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def override(tree: dict[str, Any], text: str) -> str:
    """Set in `tree` what `a.b=value` says, the key; SettingsError where it is not of that form."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise SettingsError(
            "an override is not of the form KEY=VALUE",
            path=f"--set {text}",
            fix="write it like `--set optimizer.lr=1e-3` or `--set stages.0.losses=[]`",
        )
    set_key(tree, key, _toml_value(text, value) if value else None)
    return key


def set_key(tree: dict[str, Any], key: str, value: object) -> None:
    """Set what `a.b` or `stages.0.x` or `stages.0` names; None removes it."""
    *parents, last = key.split(".")
    place: Any = tree
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else _item(place, part, key)
    if isinstance(place, list):
        _item(place, last, key)  # that there is one
        place[int(last) : int(last) + 1] = [] if value is None else [value]
        return
    if not isinstance(place, dict):
        raise SettingsError(
            f"there is nothing to set inside `{'.'.join(parents)}`",
            path=f"--set {key}",
            fix="see the keys with --dry-run",
        )
    if value is not None:
        place[last] = value
    else:
        place.pop(last, None)


def _item(place: Any, part: str, key: str) -> Any:
    count = len(place) if isinstance(place, list) else 0
    if re.fullmatch(r"[0-9]{1,9}", part) and int(part) < count:
        return place[int(part)]
    raise SettingsError(
        f"`{part[:80]}` is not one of the {count} items of this list"
        if isinstance(place, list)
        else f"there is no `{part[:80]}` to set, for this is not a section",
        path=f"--set {key}",
        fix="see the keys with --dry-run; items of lists count from 0, as in `stages.0.repeats`",
    )


def _toml_value(text: str, value: str) -> Any:
    try:
        value.encode()
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value  # a bare word is a string, as a shell would have it
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"the value is invalid: {error}", path=f"--set {text}", fix="correct it"
        ) from error
