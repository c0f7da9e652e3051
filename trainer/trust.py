"""Names of code in settings that somebody else may have written: told, and not imported.

A recipe that the user names is their own program. The settings in a checkpoint, and a run's
`settings.toml`, may come from anybody: what they name beyond our own parts is imported only where
the user says that they trust it.
"""

from __future__ import annotations

import re
from pathlib import Path

from demotools.errors import CheckpointError, SettingsError
from trainer.config import LEVELS, SETTINGS_FILE, Settings
from trainer.named import GYMNASIUM, is_importable, torch_class
from trainer.overrides import setting_leaves

# Every other text that could be imported counts as a name of code, also in settings yet to come.
_PLAIN_TEXT = re.compile(r"run\.\w+|stages\.\d+\.(off_policy\.store|early_stopping\.hold_out)")
_MINIGRID_LEVEL = re.compile(r"(BabyAI|MiniGrid)-[A-Za-z0-9-]+-v[0-9]+")


def foreign_names(settings: Settings) -> list[str]:
    """The settings that name code which is neither ours nor torch's, as `key = "module:Name"`."""
    tree = settings.model_dump(exclude_none=True, mode="json", by_alias=True)
    return [
        f'{key} = "{name}"'
        for key, name in setting_leaves(tree).items()
        if isinstance(name, str)
        and is_importable(name)
        and not _PLAIN_TEXT.fullmatch(key)
        and not _is_known(key, name, settings.run.level)
    ]


def check_trusted(settings: Settings, path: Path, *, trust: bool) -> None:
    """Refuse settings that name somebody's code, unless the user trusts them.

    CheckpointError, SettingsError  by what `path` is; the message says what would be imported
    """
    names = foreign_names(settings)
    if trust or not names:
        return
    kind = SettingsError if path.name == SETTINGS_FILE else CheckpointError
    raise kind(
        f"this names code that is not the trainer's, which was not imported: {', '.join(names)}",
        path=path,
        fix="only if you know that code, and who gave you the file: add --trust "
        "(in Python, trust=True), and it is imported and run",
    )


def _is_known(key: str, name: str, level: str) -> bool:
    if key == "on_policy.environment":
        # gymnasium itself would import the module in a level such as `module:Level-v0`
        minigrid = _MINIGRID_LEVEL.fullmatch(level) is not None
        return name == LEVELS or (name == GYMNASIUM and minigrid)
    return key in ("optimizer.type", "optimizer.schedule.type") and torch_class(name) is not None
