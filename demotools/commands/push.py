"""`demotools push`."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.commands.options import common, say


@click.command("push")
@click.argument("store")
@click.argument("place", metavar="hf:OWNER/NAME")
@click.option("--private", is_flag=True, help="If the dataset must be made, make it private.")
@common
def command(store: str, place: str, private: bool, folder: Path, quiet: bool) -> None:
    """Publish STORE as a dataset on the Hugging Face hub: its archive and its card.

    Needs the extra `hf`, and a token from `hf auth login` or $HF_TOKEN. `demotools fetch LEVEL
    --from hf:OWNER/NAME/STORE.zarr.zip` gets it back.

    \b
    Example:
      demotools push GoToLocal hf:me/babyai-demos
    """
    from demotools.push import push_store
    from demotools.store import store_path

    pushed = push_store(store_path(store, folder), place, private=private, quiet=quiet)
    if not quiet:
        say(f"published {', '.join(pushed.files)} in {pushed.repository}: {pushed.url}")
