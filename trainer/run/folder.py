"""The folder of a run: its name, its content, its lock, and what is refused before loading torch.

Loading torch takes longer than all of this, so a wrong name is reported at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from demotools.babyai.levels import listed_seeds
from demotools.errors import (
    CheckpointError,
    DemotoolsError,
    SettingsError,
    StoreError,
    from_os_error,
    printable_text,
)
from demotools.exchange.hub import on_hub
from demotools.output import acquired_lock, open_regular
from trainer.run.log import BOARD_FOLDER, CURVE_FILE, EVALUATIONS_FILE, GIFS_FOLDER
from trainer.run.log import FILE_NAME as LOG_FILE
from trainer.run.tracking import ID_FILES, TRACKERS
from trainer.settings.models import LEVELS, SETTINGS_FILE, Settings, read_settings

CHECKPOINT_FILE = "last.pt"
BEST = "best.pt"
FAILED = "failed.pt"
COPIES = "after-*.pt"
REPLACED = ".replaced"
"""Where the files of a run wait until the run that replaces it has a checkpoint."""
FILES = (
    # the checkpoint first: it is the sign that a run has something to lose
    *(CHECKPOINT_FILE, SETTINGS_FILE, BEST, FAILED, COPIES),
    *(LOG_FILE, EVALUATIONS_FILE, CURVE_FILE, BOARD_FOLDER, GIFS_FOLDER, *ID_FILES),
)
SEED_FOLDER = "seed-"
"""How the folders begin that `trainer run --seeds` makes, one a seed, in that of the experiment."""
HARMLESS = (
    *("run.name", "run.save_every_", "run.keep", "evaluation."),
    *(f"run.{key}" for key in TRACKERS),
)
"""How the settings begin on which no weight depends."""
_LONGEST_NAME = 120
_MOST_SETTINGS_BYTES = 2**22


def run_folder(
    name: str,
    overrides: Sequence[str] = (),
    *,
    tiny: bool = False,
    init_from: Path | str | None = None,
    output: Path | str | None = None,
    resume: bool = False,
) -> Path:
    """`runs/NAME`; what `--set` changes is part of the name, so that variants lie side by side.

    name     `run.name`: where an override gives it, that is the whole name
    output   where it shall be; None: under `runs`
    resume   the changes may be those of a plan that has grown, of the run without them

    >>> run_folder("boss", ["run.seed=3", "optimizer.lr=1e-3", "run.keep=2"]).as_posix()
    'runs/boss,lr=1e-3,seed=3'
    >>> run_folder("boss", ["run.name=boss"], tiny=True).as_posix()
    'runs/boss,tiny'
    """
    if output is not None:
        return Path(output)
    overrides = [*overrides, *([f"run.init_from={init_from}"] if init_from is not None else [])]
    pairs = [[part.strip() for part in text.partition("=")] for text in overrides]
    values = {key: value for key, _equals, value in pairs}
    parts = []
    if "run.name" not in values:
        ends = [key.rpartition(".")[2] for key in values]
        for key, value in values.items():
            end = key.rpartition(".")[2]
            if not key.startswith(HARMLESS):
                plain = re.sub(r"[^\w.+-]+", "_", value).strip("_")
                parts.append(f"{end if ends.count(end) == 1 else key}={plain}")
    whole = ",".join([name, *sorted(parts), *(["tiny"] if tiny else [])])
    if len(whole.encode()) > _LONGEST_NAME and len(whole) > len(name):
        digest = hashlib.sha256("\0".join(sorted(overrides)).encode()).hexdigest()
        whole = f"{name},{digest[:8]}" + (",tiny" if tiny else "")
    begun = run_folder(name, tiny=tiny) if overrides and resume else None
    folder = Path("runs") / whole
    return begun if begun and has_checkpoint(begun) and not folder.exists() else folder


def seed_runs(
    seeds: str,
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    tiny: bool,
    init_from: str | None,
    output: Path | None,
    resume: bool,
) -> list[tuple[Path, tuple[str, ...]]]:
    """The folder and the overrides of the run with each of these seeds; see `run_folder`.

    A seed that a resumed experiment has not begun begins with the weights that the others did.

    SettingsError  of the recipe; `seeds` is no list of seeds
    """
    settings = read_settings(recipe, overrides, tiny=tiny).run
    whole = run_folder(
        settings.name, overrides, tiny=tiny, init_from=init_from, output=output, resume=resume
    )
    runs = []
    for seed in listed_seeds(seeds):
        folder, own = whole / f"{SEED_FOLDER}{seed}", (*overrides, f"run.seed={seed}")
        named = init_from is not None or settings.init_from is not None
        begun = None if named or not resume or has_checkpoint(folder) else _begun_with(whole)
        if begun is not None:
            own = (*own, f"run.init_from={json.dumps(begun)}")
        runs.append((folder, own))
    return runs


def _begun_with(folder: Path) -> str | None:
    """Whose weights the runs of several seeds in a folder began with; None: anew."""
    for file in sorted(folder.glob(f"{SEED_FOLDER}*/{SETTINGS_FILE}")):
        if has_checkpoint(file.parent):
            return read_settings(str(file)).run.init_from
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether a run can go on from here, perhaps one whose replacement has none yet."""
    return any((place / CHECKPOINT_FILE).is_file() for place in (folder, folder / REPLACED))


def no_checkpoint(file: Path) -> CheckpointError:
    """What is raised where a user names a checkpoint that is not there."""
    folder = file.parent if file.name == CHECKPOINT_FILE else file
    runs = sorted(path.parent for path in folder.glob(f"*/{CHECKPOINT_FILE}"))
    return CheckpointError(
        "there is no checkpoint",
        path=file,
        fix=f"name one run, such as {printable_text(runs[0])}"
        if runs
        else "name the folder of a run, or train one: `trainer run bc_small_cpu.toml`",
    )


def refuse_missing(checkpoint: Path | None) -> None:
    """CheckpointError, before torch is loaded, where nothing has this name here, nor on the hub."""
    if checkpoint and not checkpoint.exists() and not on_hub(checkpoint):
        raise no_checkpoint(checkpoint)


def refuse_level(level: str | None, checkpoint: Path | None) -> None:
    """ManifestError or LevelError, before torch is loaded, where no such level can be played.

    checkpoint   if environments of somebody's belong to it, they know other levels
    """
    if level is None or (checkpoint is not None and _environment_of(checkpoint) != LEVELS):
        return
    from trainer.acting.vector import check_playable  # it loads minigrid

    check_playable(level)


def _environment_of(checkpoint: Path) -> str | None:
    """What makes the environments of a checkpoint's run; None: unknown before it is loaded."""
    try:
        if checkpoint.is_dir():
            return read_settings(str(checkpoint / SETTINGS_FILE)).environment
        with open_regular(checkpoint) as stream, zipfile.ZipFile(stream) as archive:
            (name,) = (one for one in archive.namelist() if one.endswith("/data.pkl"))
            with archive.open(name) as member:
                text = member.read(_MOST_SETTINGS_BYTES)
    except (DemotoolsError, OSError, ValueError, zipfile.BadZipFile):
        return None
    # the settings are a text in the pickle, and say it where there are environments
    named = re.search(rb'\nenvironment = "([^"\n]*)"', text)
    return named[1].decode("utf-8", "replace") if named else LEVELS


def check_suffix(path: Path, *suffixes: str) -> None:
    """SettingsError where the name of an output says that it is of another kind than it will be.

    suffixes   of its kind, the usual one first
    """
    if path.suffix and path.suffix.lower() not in suffixes:
        kind = suffixes[0].removeprefix(".").upper()
        raise SettingsError(
            f"the output is {kind}, but this name ends in {path.suffix}",
            path=path,
            fix=f"name it {path.with_suffix(suffixes[0]).name}",
        )


def left_by_a_run(folder: Path) -> list[Path]:
    """What a run has written into a folder."""
    return [path for name in FILES for path in folder.glob(name)]


def check_free(folder: Path) -> None:
    """SettingsError where there is a run in the folder."""
    if not left_by_a_run(folder):
        return
    what = "there is already a run in this folder"
    fix = "add --resume to continue it, or --overwrite to replace it"
    if not has_checkpoint(folder):
        what = "a run in this folder ended before its first checkpoint"
        fix = "add --resume=auto or --overwrite to start it again"
    raise SettingsError(what, path=folder, fix=f"{fix}, or name another folder with -o")


@contextmanager
def claimed(folder: Path, *, new: bool, overwrite: bool) -> Iterator[None]:
    """A folder in order, in which nobody else trains inside.

    new         the files of the run before are set aside, see `_emptied`
    overwrite   though it has a checkpoint

    SettingsError  another process trains there, or there is a run that must stay
    """
    try:
        lock = acquired_lock(folder / "run")
    except StoreError as error:
        raise SettingsError(
            "another process is training in this folder",
            path=folder,
            fix="wait for it to finish, stop it, or name another folder with -o",
        ) from error
    except DemotoolsError as error:  # the user named the folder, not what is locked in it
        raise SettingsError(error.what, path=folder, fix=error.fix) from error
    try:
        _settle(folder)
        with _emptied(folder, overwrite=overwrite) if new else nullcontext():
            yield
    finally:
        lock.release()


@contextmanager
def _emptied(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """A place for a new run, where the files of the one before come back if it has no checkpoint.

    Only what a run writes is ever moved or removed.
    """
    if not overwrite:
        check_free(folder)
    try:
        try:
            for path in left_by_a_run(folder):
                (folder / REPLACED).mkdir(exist_ok=True)
                path.rename(folder / REPLACED / path.name)
        except OSError as error:
            raise from_os_error(error, folder) from error
        yield
    finally:
        _settle(folder)


def _settle(folder: Path) -> None:
    """Remove a run that has been replaced; where the one in its place has no checkpoint, undo it.

    Whenever this is cut short, doing it again ends as it would have ended.
    """
    aside = folder / REPLACED
    try:
        if not aside.is_dir():
            return
        if not (folder / CHECKPOINT_FILE).exists():
            # the checkpoint last: where it lies decides
            for path in sorted(aside.iterdir(), key=lambda path: path.name == CHECKPOINT_FILE):
                if (folder / path.name).is_dir():
                    shutil.rmtree(folder / path.name)
                if path.name != FAILED or not (folder / FAILED).exists():
                    path.replace(folder / path.name)  # a message may point at the new failure
        shutil.rmtree(aside)
    except OSError as error:
        raise from_os_error(error, folder) from error


def refuse_early(
    recipe: str,
    *,
    overrides: Sequence[str] = (),
    tiny: bool = False,
    data_dir: Path,
    output: Path | None = None,
    init_from: str | None = None,
    new: bool = True,
) -> None:
    """Refuse, before torch is loaded, what could not begin anyway.

    new   whether the run must find its folder empty

    SettingsError  of the recipe; there is a run in the folder
    StoreError     a store is missing or damaged
    """
    settings = read_settings(recipe, overrides, tiny=tiny)
    # of the processes that train together the others may see what the first has begun to write
    if new and os.environ.get("RANK", "0") == "0":
        name = settings.run.name
        folder = run_folder(name, overrides, tiny=tiny, init_from=init_from, output=output)
        # files of an earlier run that wait there come back first, when the folder is claimed
        if not (folder / REPLACED).exists():
            check_free(folder)
    _check_stores(settings, data_dir)


def _check_stores(settings: Settings, folder: Path) -> None:
    # half of what this module loads
    from demotools.store.format import store_exists
    from demotools.store.reading import open_store, store_path

    for name in settings.store_names():
        if name != "auto":
            open_store(store_path(name, folder))
            continue
        for level in settings.run.level_names:
            name = level.rpartition(":")[2]  # of one that a module registers
            if not store_exists(store_path(f"{name}-small", folder)):
                open_store(store_path(name, folder))
