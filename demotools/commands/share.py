"""Commands that hand stores on: export, archive, unarchive, card, push."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from demotools.cli import common, overwrite_store, say


@click.command("export")
@click.argument("store")
@click.option(
    "--to",
    "kind",
    type=click.Choice(["pickle", "minari"]),
    required=True,
    help="The other program's layout.",
)
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path),
    help="pickle: the file [default: beside the store, named as babyai does]; minari: the folder "
    "of datasets [default: Minari's own].",
)
@click.option("--id", "dataset_id", help="minari: the dataset's id [default: babyai/NAME-v0].")
@overwrite_store
@common
def export_command(
    store: str,
    kind: Literal["pickle", "minari"],
    output: Path | None,
    dataset_id: str | None,
    overwrite: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Write STORE for other programs: a legacy pickle for babyai's own loader, or a Minari dataset.

    \b
    Example:
      demotools export GoToLocal --to pickle -o demos/BabyAI-GoToLocal-v0_agent.pkl
      demotools export GoToLocal --to minari
    """
    from demotools.exchange.export import export_minari, export_pickle, pickle_name
    from demotools.store.reading import open_store, store_path

    opened = open_store(store_path(store, folder))
    if kind == "minari":
        exported = export_minari(
            opened, root=output, dataset_id=dataset_id, overwrite=overwrite, quiet=quiet
        )
        lines = exported.text().split("\n")
    else:
        if dataset_id:
            raise click.UsageError("--id goes with --to minari")
        file = output or opened.path.with_name(pickle_name(opened))
        export_pickle(opened, file, overwrite=overwrite, quiet=quiet)
        lines = [f"exported {file}: {opened.episodes:,} episodes; this layout has no seeds"]
    if not quiet:
        say(*lines)


@click.command("archive")
@click.argument("store")
@click.option("-o", "output", type=click.Path(path_type=Path), help="The file [default: beside].")
@click.option("--overwrite", is_flag=True, help="Replace a file of the same name.")
@common
def archive_command(
    store: str, output: Path | None, overwrite: bool, folder: Path, quiet: bool
) -> None:
    """Pack STORE into one compressed file, NAME.zarr.zip, to carry or to publish.

    Plain zarr reads the file; `demotools unarchive` restores the store bit for bit.

    \b
    Example:
      demotools archive GoToLocal
    """
    from demotools.exchange.archive import archive_store
    from demotools.output import size_text
    from demotools.store.reading import store_path

    file = archive_store(store_path(store, folder), output, overwrite=overwrite, quiet=quiet)
    if not quiet:
        say(f"made {file}: {size_text(file.stat().st_size)}")


@click.command("unarchive")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the store [default: the file's].")
@overwrite_store
@common
def unarchive_command(
    file: Path, name: str | None, overwrite: bool, folder: Path, quiet: bool
) -> None:
    """Restore the store of FILE, made by `demotools archive`, bit for bit.

    \b
    Example:
      demotools unarchive GoToLocal.zarr.zip --name GoToLocal-copy
    """
    from demotools.exchange.archive import archived_store_name, unarchive_store
    from demotools.store.reading import new_store_path

    path = new_store_path(name or archived_store_name(file), folder)
    unarchive_store(file, path, overwrite=overwrite, quiet=quiet)
    if not quiet:
        say(f"made {path}")


@click.command("card")
@click.argument("store")
@click.option(
    "-o", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write it to this file."
)
@click.option("--overwrite", is_flag=True, help="Replace a file of the same name.")
@common
def card_command(
    store: str, output: Path | None, overwrite: bool, folder: Path, quiet: bool
) -> None:
    """Print a dataset card of STORE: Markdown with the header that Hugging Face reads.

    \b
    Example:
      demotools card GoToLocal -o README.md
    """
    from demotools.exchange.hub import store_card
    from demotools.output import write_output
    from demotools.store.reading import store_path

    text = store_card(store_path(store, folder))
    if output is None:
        say(*text.removesuffix("\n").split("\n"))
        return
    write_output(output, text.encode(), overwrite=overwrite)
    if not quiet:
        say(f"made {output}")


@click.command("push")
@click.argument("store")
@click.argument("place", metavar="hf:OWNER/NAME")
@click.option("--private", is_flag=True, help="If the dataset must be made, make it private.")
@common
def push_command(store: str, place: str, private: bool, folder: Path, quiet: bool) -> None:
    """Publish STORE as a dataset on the Hugging Face hub: its archive and its card.

    Needs the extra `hf`, and a token from `hf auth login` or $HF_TOKEN. `demotools fetch LEVEL
    --from hf:OWNER/NAME/STORE.zarr.zip` gets it back.

    \b
    Example:
      demotools push GoToLocal hf:me/babyai-demos
    """
    from demotools.exchange.hub import push_store
    from demotools.store.reading import store_path

    pushed = push_store(store_path(store, folder), place, private=private, quiet=quiet)
    if not quiet:
        say(f"published {', '.join(pushed.files)} in {pushed.repository}: {pushed.url}")
