"""Levels: one TOML file each under `manifests/`, shipped inside the wheel.

Levels without published files have no file of their own: `families.toml` lists them by grammar.
A user's folder of manifests (`--manifests`, `$DEMOTOOLS_MANIFESTS`) adds to them or overrides them.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from demotools.errors import ManifestError, SettingsError, first_problem, from_os_error
from demotools.output import read_regular

MANIFESTS_VARIABLE = "DEMOTOOLS_MANIFESTS"
Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")
Symmetry = Literal["recolor", "mirror", "retype", "rephrase"]
_ARCHIVES = "archives.toml"
_DATASETS = "datasets.toml"
_FAMILIES = "families.toml"
_LEVEL_NAME = re.compile(r"[A-Z][A-Za-z0-9]*")
_OTHER_ID = re.compile(r"(?!BabyAI-)([\w-]+/)?[\w.-]+-v\d+")
# the longest that BabyAI's grammar makes is under 400; another text must not stall the pattern
_LONGEST_MISSION = 1000


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Source(_Frozen):
    """One place a file, or its episodes, can be had from: exactly one of five kinds."""

    gdrive: Annotated[str, StringConstraints(pattern=r"^[\w-]{10,}$")] | None = None
    """Google Drive file id."""
    https: Annotated[str, StringConstraints(pattern=r"^https?://[^/\s]+/\S*$")] | None = None
    """Address of the file."""
    hf: Annotated[str, StringConstraints(pattern=r"^[^/\s]+/[^/\s]+/\S+$")] | None = None
    """Hugging Face dataset: `owner/name/path`, or `owner/name/path@revision`."""
    archive: str | None = None
    """Name of an archive of `archives.toml` that holds the file as a member."""
    member: str | None = None
    """Of an archive: shell-style pattern of the member's base name; None means the file's name."""
    dataset: str | None = None
    """Name of a data set of `datasets.toml` that holds the episodes."""
    config: Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")] | None = None
    """Of a data set: its configuration, a folder of parquet files."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [self.gdrive, self.https, self.hf, self.archive, self.dataset]
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("a source has exactly one of gdrive, https, hf, archive, dataset")
        if self.member is not None and self.archive is None:
            raise ValueError("`member` needs `archive`")
        if (self.config is None) != (self.dataset is None):
            raise ValueError("`dataset` and `config` must be given together")
        return self

    def __str__(self) -> str:
        if self.dataset is not None:
            return f"{self.dataset} {self.config}"
        return next(f"{kind} {place}" for kind, place in self if place is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """What `fetch --source` may call it: its kind, the archive's or data set's own name."""
        kind = next(kind for kind, place in self if place is not None)
        return (kind, _ALIASES.get(kind, kind), self.archive or self.dataset or kind)


_ALIASES = {"gdrive": "drive", "https": "web", "hf": "hub"}


class PublishedFile(_Frozen):
    """One published file; None means that its size or hash is not published."""

    name: Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
    sources: tuple[Source, ...]
    size_bytes: Annotated[int, Field(gt=0)] | None = None
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] | None = None
    md5: Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")] | None = None


class PublishedDataset(_Frozen):
    """A data set on the Hugging Face hub whose configurations are levels.

    Each configuration is a folder of parquet files in the schema of JAT (docs/exchange.md).
    """

    repository: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, StringConstraints(pattern=r"^\w[\w./-]*$")] = "main"
    """A commit, a tag or a branch; the commit that it stands for is kept with what was fetched."""
    licence: str
    citation: str


class _Symmetric(_Frozen):
    """Which symmetries the task has (docs/augmentation.md): only what tests/data/test_augment.py
    proves.

    An episode that a symmetry changes is an episode of the same task in the equally changed
    environment: the same views, the same mission, and the expert's actions still solve it.
    """

    symmetries: tuple[Symmetry, ...] = ()
    widened_by: tuple[Symmetry, ...] = ()
    """Those of `symmetries` that make episodes which the level itself never has."""
    unchanged_words: tuple[Annotated[str, StringConstraints(pattern="^[a-z]+$")], ...] = ()
    """Mission words beyond BabyAI's that name nothing which the symmetries change."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for values in (self.symmetries, self.widened_by, self.unchanged_words):
            if len(set(values)) < len(values):
                raise ValueError(f"{', '.join(values)}: list each only once")
        if extra := set(self.widened_by) - set(self.symmetries):
            raise ValueError(f"widened_by lists {', '.join(extra)}, but symmetries does not")
        return self


class Manifest(_Symmetric):
    """What is known of a level."""

    level: str
    environment_id: str | None = None
    """Gymnasium id; None where today's minigrid has no such environment, see `no_environment`."""
    no_environment: str | None = None
    """Why there is no environment."""
    mission_pattern: str
    """A regular expression that every mission of the level matches as a whole."""
    licence: str = "BSD-3-Clause (BabyAI, the package that recorded the demonstrations)"
    citation: str = (
        "Chevalier-Boisvert et al., BabyAI: A Platform to Study the Sample Efficiency of "
        "Grounded Language Learning, ICLR 2019, arXiv:1810.08272"
    )
    files: dict[Split, PublishedFile] = Field(default_factory=dict)

    @field_validator("mission_pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _environment_or_reason(self) -> Self:
        if (self.environment_id is None) == (self.no_environment is None):
            raise ValueError("give either environment_id or no_environment (the reason)")
        return self

    def store_attributes(self, **others: str) -> dict[str, Any]:
        """What a store of the level's episodes says of them; `others` replace or join that."""
        kept = ("level", "environment_id", "licence", "citation")
        return {name: getattr(self, name) for name in kept} | others

    def matches_mission(self, mission: str) -> bool:
        """Whether this is a mission of the level."""
        if len(mission) > _LONGEST_MISSION:
            return False
        return re.fullmatch(self.mission_pattern, mission) is not None


class _Family(_Symmetric):
    """Environments that share one grammar of missions, and symmetries."""

    environments: tuple[str, ...]
    like: str | None = None
    """The level whose manifest holds the grammar; None: it is `mission_pattern`."""
    mission_pattern: str | None = None

    @model_validator(mode="after")
    def _one_grammar(self) -> Self:
        if (self.like is None) == (self.mission_pattern is None):
            raise ValueError("give either like (a level) or mission_pattern")
        return self


class _Families(_Frozen):
    family: tuple[_Family, ...]
    configurations: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Of each data set: level -> its configuration."""


def shipped_manifests() -> Path:
    """The folder of manifests of this installation: in the wheel, or beside a source checkout."""
    package = Path(__file__).parents[1]
    inside = package / "manifests"
    return inside if inside.is_dir() else package.parent / "manifests"


def manifest_folders(extra: Path | None = None) -> list[Path]:
    """Where manifests are looked up, the first folder that has a level wins."""
    user = [extra] if extra else []
    if not extra and (variable := os.environ.get(MANIFESTS_VARIABLE)):
        user = [Path(variable)]
    return [*user, shipped_manifests()]


def level_names(extra: Path | None = None) -> list[str]:
    """The names of all levels that have a manifest of their own."""
    found = {
        path.stem
        for folder in manifest_folders(extra)
        for path in folder.glob("*.toml")
        if _LEVEL_NAME.fullmatch(path.stem)
    }
    return sorted(found)


def all_level_names(extra: Path | None = None) -> list[str]:
    """The names of all levels: those with a manifest of their own, and those of the families."""
    families = {
        level_from_environment_id(environment)
        for families in _families(extra)
        for family in families.family
        for environment in family.environments
    }
    return sorted(families.union(level_names(extra)))


def read_manifest(level: str, extra: Path | None = None) -> Manifest:
    """The manifest of a level, by its name (`GoToLocal`) or environment id.

    ManifestError  unknown level (the nearest names are given), or a file that does not parse
    """
    name = level_from_environment_id(level)
    paths = [folder / f"{name}.toml" for folder in manifest_folders(extra)]
    if _LEVEL_NAME.fullmatch(name):
        for path in filter(Path.is_file, paths):
            manifest = _parsed(path, Manifest.model_validate)
            if manifest.level == name:
                return manifest
            what = f"the manifest is for level {manifest.level}, but the file is not named after it"
            raise ManifestError(what, path=path, fix="give the file the name of its level")
    for families in _families(extra):
        for family in families.family:
            for environment_id in family.environments:
                if level_from_environment_id(environment_id) == name:
                    return _member(family, environment_id, families, extra)
    raise ManifestError("there is no such level", path=level, fix=_nearest(name, extra))


def bare_manifest(environment_id: str) -> Manifest:
    """What there is to say of a gymnasium environment that no manifest describes."""
    ours = environment_id.startswith("MiniGrid-")
    return Manifest(
        level=environment_id,
        environment_id=environment_id,
        mission_pattern="(?s).*",
        licence="MIT (Minigrid, the package that made the levels)" if ours else "unknown",
        citation="Chevalier-Boisvert et al., Minigrid & Miniworld: Modular & Customizable "
        "Reinforcement Learning Environments for Goal-Oriented Tasks, NeurIPS 2023, "
        "arXiv:2306.13831"
        if ours
        else "unknown",
    )


def manifest_of_data(level: str) -> Manifest:
    """The manifest of a level whose episodes are read, not played; also of any gymnasium id.

    ManifestError  as `read_manifest`
    """
    try:
        return read_manifest(level)
    except ManifestError as error:
        if error.path != level or not _OTHER_ID.fullmatch(level):
            raise
    return bare_manifest(level)


def guessed_manifest(level: str, source: Path | str, read_off: str) -> Manifest:
    """The manifest of a level that the user has not named, but `read_off` says.

    source         what the user has named
    ManifestError  there is no such level: the source is named, not a level that nobody gave
    """
    try:
        return manifest_of_data(level)
    except ManifestError as error:
        if error.path != level:
            raise
        near = difflib.get_close_matches(level, all_level_names(), n=1, cutoff=0.7)
        raise ManifestError(
            f"the level cannot be inferred from {read_off}",
            path=source,
            fix=f"add --level, for example --level {near[0] if near else 'GoToLocal'}",
        ) from error


def manifest_text(level: str) -> str:
    """The manifest of a level as TOML: its file, or what its family says of it.

    ManifestError  see `read_manifest`
    """
    manifest = read_manifest(level)
    for folder in manifest_folders():
        path = folder / f"{manifest.level}.toml"
        if path.is_file():
            return path.read_text("utf-8")
    known = manifest.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    return tomli_w.dumps(known)


def read_archive(name: str) -> PublishedFile:
    """An archive that holds the files of several levels, by its name in `archives.toml`.

    ManifestError  no such archive, or a file that does not parse
    """
    return _entry(name, _ARCHIVES, _ARCHIVES_TABLE, "archive")


def read_dataset(name: str) -> PublishedDataset:
    """A data set that holds the episodes of several levels, by its name in `datasets.toml`.

    ManifestError  no such data set, or a file that does not parse
    """
    return _entry(name, _DATASETS, _DATASETS_TABLE, "data set")


def _entry(name: str, file: str, table: TypeAdapter[dict[str, Parsed]], what: str) -> Parsed:
    """The entry of this name in the first of the folders' files that has it."""
    for path in (folder / file for folder in manifest_folders()):
        if path.is_file():
            entries = _parsed(path, table.validate_python)
            if name in entries:
                return entries[name]
    raise ManifestError(f"there is no such {what}", path=name, fix=f"define it in {file}")


def levels_of_datasets() -> list[str]:
    """The levels of the families that a data set holds: those without a manifest of their own."""
    tables = [table for each in _families() for table in each.configurations.values()]
    return sorted({level for table in tables for level in table})


def level_of_configuration(name: str) -> str | None:
    """The level that a name means as data sets spell it; None where it means none.

    >>> level_of_configuration("babyai-go-to-local"), level_of_configuration("babyai-put-next")
    ('GoToLocal', 'PutNextS7N4')
    """
    for families in _families():
        for table in families.configurations.values():
            for level, configuration in table.items():
                if configuration == name:
                    return level
    folded = {level.lower(): level for level in all_level_names()}
    return folded.get(
        level_from_environment_id(name).replace("-", "").lower().removeprefix("babyai")
    )


def level_from_environment_id(name: str) -> str:
    """The level's name in an environment id or file name.

    >>> level_from_environment_id("BabyAI-GoToLocal-v0")
    'GoToLocal'
    """
    return re.sub(r"^BabyAI-|-v\d+$", "", name)


def store_name(level: str, split: str) -> str:
    """The name of the store that a split of a level becomes.

    >>> store_name("GoToLocal", "train"), store_name("GoToLocal", "valid")
    ('GoToLocal', 'GoToLocal-valid')
    """
    return level if split == "train" else f"{level}-{split}"


def _families(extra: Path | None = None) -> list[_Families]:
    paths = [folder / _FAMILIES for folder in manifest_folders(extra)]
    return [_parsed(path, _Families.model_validate) for path in filter(Path.is_file, paths)]


def _member(
    family: _Family, environment_id: str, families: _Families, extra: Path | None
) -> Manifest:
    """The manifest of one level of a family."""
    level = level_from_environment_id(environment_id)
    sources = tuple(
        Source(dataset=dataset, config=table[level])
        for dataset, table in families.configurations.items()
        if level in table
    )
    pattern = family.mission_pattern
    if family.like is not None:
        pattern = read_manifest(family.like, extra).mission_pattern
    files: dict[Split, PublishedFile] = {
        "train": PublishedFile(name=environment_id, sources=sources),
        "valid": PublishedFile(name=f"{environment_id}_valid", sources=sources),
    }
    return Manifest(
        level=level,
        environment_id=environment_id,
        mission_pattern=pattern or "",
        symmetries=family.symmetries,
        widened_by=family.widened_by,
        unchanged_words=family.unchanged_words,
        files=files if sources else {},
    )


def _nearest(name: str, extra: Path | None) -> str:
    folded = {known.lower(): known for known in all_level_names(extra)}
    near = [folded[n] for n in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.4)]
    return (
        f"did you mean {', '.join(near)}?"
        if near
        else f"the levels are {', '.join(level_names(extra))}"
    )


_ARCHIVES_TABLE = TypeAdapter(dict[str, PublishedFile])
_DATASETS_TABLE = TypeAdapter(dict[str, PublishedDataset])
Parsed = TypeVar("Parsed")


def _parsed(path: Path, validate: Callable[[Any], Parsed]) -> Parsed:
    try:
        return validate(tomllib.loads(path.read_text("utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"the manifest is not valid TOML: {error}", path=path, fix="correct the file"
        ) from error
    except OSError as error:
        raise from_os_error(error, path) from error
    except ValidationError as error:
        key, what = first_problem(error, "toml")
        raise ManifestError(
            f"the manifest is invalid at `{key}`: {what}", path=path, fix="correct that key"
        ) from error


# Source: babyai's make_agent_demos counts train seeds from 0 and valid seeds from 1e9.
SEEDS: dict[Split, range] = {
    "train": range(0, 1_000_000_000),
    "valid": range(1_000_000_000, 2_000_000_000),
}
EVALUATION_SEED = 2_000_000_000
"""First seed of evaluation, [2e9, 2e9 + n): no store may use them."""
MOST_EPISODES = 10_000_000
"""The largest n of one evaluation."""


def listed_seeds(text: str) -> Sequence[int]:
    """The seeds of a list such as `1000-1511` or `1,2,7-9`, both ends included, in its order.

    SettingsError  it is no such list, a seed is there twice, or there are too many

    >>> listed_seeds("5,7-9"), listed_seeds("1000-1511")
    ([5, 7, 8, 9], range(1000, 1512))
    """
    spans = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise SettingsError(
                "this is not a list of seeds", path=text[:200], fix="write it like `1,2,7-9`"
            )
        spans.append(range(first, last + 1))
    if sum(map(len, spans)) > MOST_EPISODES:
        raise SettingsError(
            "there are too many seeds", path=text[:200], fix=f"give at most {MOST_EPISODES:,}"
        )
    if len(spans) == 1:
        return spans[0]
    seeds = [seed for span in spans for seed in span]
    if len(set(seeds)) < len(seeds):
        raise SettingsError("a seed is listed twice", path=text[:200], fix="list each only once")
    return seeds


def seeds_of(text: str) -> Sequence[int]:
    """The seeds of a list, see `listed_seeds`, or of a file of lists, one or more a line.

    SettingsError   as `listed_seeds`
    DemotoolsError  the file cannot be read
    """
    if not re.search(r"[^\d,\s-]", text):
        return listed_seeds(text)
    if not Path(text).exists():
        raise SettingsError(
            "there is no such file, and this is not a list of seeds",
            path=text[:200],
            fix="name an existing file, or write a list like `1,2,7-9`",
        )
    content = read_regular(Path(text)).decode("utf-8", "replace")
    return listed_seeds(re.sub(r"[\s,]+", ",", content).strip(","))
