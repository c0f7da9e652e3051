"""Levels: one TOML file each under `manifests/`, shipped inside the wheel.

A user's folder of manifests (`--manifests`, `$DEMOTOOLS_MANIFESTS`) adds to them or overrides them.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from demotools.errors import ManifestError

MANIFESTS_VARIABLE = "DEMOTOOLS_MANIFESTS"
Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Frozen):
    """One place a file can be had from; exactly one of the four kinds."""

    gdrive: str | None = None
    """Google Drive file id."""
    https: str | None = None
    """Address of the file."""
    hf: str | None = None
    """Hugging Face: `repository:file`."""
    archive: str | None = None
    """Name of an archive of `manifests/archives.toml` that holds the file as a member."""
    member: str | None = None
    """Pattern (shell style) of the member's name inside the archive."""


class DemoFile(_Frozen):
    """One published file; None means that its size or hash is not published."""

    name: str
    sources: tuple[Source, ...]
    size_bytes: int | None = None
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] | None = None
    md5: Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")] | None = None


class Manifest(_Frozen):
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
    files: dict[Split, DemoFile] = Field(default_factory=dict)

    def matches_mission(self, mission: str) -> bool:
        """Whether this is a mission of the level."""
        return re.fullmatch(self.mission_pattern, mission) is not None


def shipped_manifests() -> Path:
    """The folder of manifests of this installation: in the wheel, or beside a source checkout."""
    package = Path(__file__).parent
    inside = package / "manifests"
    return inside if inside.is_dir() else package.parent / "manifests"


def manifest_folders(extra: Path | None = None) -> list[Path]:
    """Where manifests are looked up, the first folder that has a level wins."""
    user = [extra] if extra else []
    if not extra and (variable := os.environ.get(MANIFESTS_VARIABLE)):
        user = [Path(variable)]
    return [*user, shipped_manifests()]


def level_names(extra: Path | None = None) -> list[str]:
    """The names of all levels that have a manifest."""
    found = {
        path.stem
        for folder in manifest_folders(extra)
        for path in folder.glob("*.toml")
        if path.stem[:1].isupper()
    }
    return sorted(found)


def read_manifest(level: str, extra: Path | None = None) -> Manifest:
    """The manifest of a level, by its name (`GoToLocal`) or environment id.

    ManifestError  unknown level (the nearest names are given), or a file that does not parse
    """
    name = level_from_environment_id(level)
    for folder in manifest_folders(extra):
        path = folder / f"{name}.toml"
        if path.is_file():
            return _parsed_manifest(path)
    names = level_names(extra)
    folded = {known.lower(): known for known in names}
    near = [folded[n] for n in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.4)]
    hint = f"did you mean {', '.join(near)}?" if near else f"the levels are {', '.join(names)}"
    raise ManifestError("there is no such level", path=level, fix=hint)


def level_from_environment_id(name: str) -> str:
    """The level's name in an environment id or file name.

    >>> level_from_environment_id("BabyAI-GoToLocal-v0")
    'GoToLocal'
    """
    return re.sub(r"^BabyAI-|-v\d+$", "", name)


@cache
def _parsed_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate(tomllib.loads(path.read_text("utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(
            f"the manifest is not valid TOML: {error}", path=path, fix="correct the file"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ManifestError(
            f"the manifest is wrong at `{key}`: {first['msg']}", path=path, fix="correct that key"
        ) from error
