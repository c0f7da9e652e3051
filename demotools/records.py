"""`fetched.toml` beside the data: what the first whole download of each file was."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import filelock
import tomli_w
from pydantic import TypeAdapter, ValidationError

from demotools.errors import FetchError, from_os_error
from demotools.fetch_plan import RECORDS_NAME, FetchedRecord

_TABLE = TypeAdapter(dict[str, FetchedRecord])


def read_records(folder: Path) -> dict[str, FetchedRecord]:
    """File name -> record; empty where nothing was fetched yet.

    FetchError  the file does not parse
    """
    path = folder / RECORDS_NAME
    try:
        return _TABLE.validate_python(tomllib.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, ValidationError) as error:
        raise FetchError(
            f"the records of earlier fetches cannot be read: {str(error).splitlines()[0]}",
            path=path,
            fix="correct the file, or remove it: then later fetches are checked against nothing",
        ) from error
    except OSError as error:
        raise from_os_error(error, path) from error


def write_record(folder: Path, name: str, record: FetchedRecord) -> None:
    """Keep the record of a file; one that is there already stays."""
    path = folder / RECORDS_NAME
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        records = read_records(folder)
        if name in records:
            return
        table = {key: value.model_dump() for key, value in {**records, name: record}.items()}
        try:
            temporary.write_text(tomli_w.dumps(dict(sorted(table.items()))), "utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise from_os_error(error, path) from error
