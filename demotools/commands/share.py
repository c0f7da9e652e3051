"""Commands that hand stores on: export, card, push."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from demotools.cli import (
    Shell,
    common,
    output_option,
    overwrite_file,
    overwrite_store,
    say,
)


@click.command("export")
@click.argument("store")
@click.option(
    "--to",
    "kind",
    type=click.Choice(["pickle", "parquet", "minari"]),
    required=True,
    help="Target format.",
)
@output_option(
    "File to write, or folder of Minari datasets.",
    "beside the store; Minari's own folder",
)
@click.option(
    "--id", "dataset_id", show_default="babyai/STORE-v0", help="Id of the Minari dataset."
)
@overwrite_store
@common
def export_command(
    shell: Shell,
    store: str,
    kind: Literal["pickle", "parquet", "minari"],
    output: Path | None,
    dataset_id: str | None,
    overwrite: bool,
) -> None:
    """Export a store to a file or dataset of other programs.

    The pickle is one that babyai's own loader reads. The parquet file has the schema of the JAT
    data set, and is read by `datasets.load_dataset`.

    \b
    Example:
      demotools export GoToLocal --to pickle -o demos/BabyAI-GoToLocal-v0_agent.pkl
      demotools export GoToLocal --to parquet
      demotools export GoToLocal --to minari
    """
    from demotools.exchange.export import export_minari, export_pickle
    from demotools.exchange.parquet import export_parquet
    from demotools.store.reading import open_store

    opened = open_store(shell.store(store))
    if kind != "minari" and dataset_id:
        raise click.UsageError("--id needs --to minari")
    if kind != "minari":
        export = {"pickle": export_pickle, "parquet": export_parquet}[kind]
        exported = export(opened, output, overwrite=overwrite, quiet=shell.quiet)
    else:
        exported = export_minari(
            opened, root=output, dataset_id=dataset_id, overwrite=overwrite, quiet=shell.quiet
        )
    shell.print_result(exported)


@click.command("card")
@click.argument("store")
@output_option("Write the card to this file.", "print it", dir_okay=False)
@overwrite_file
@common
def card_command(shell: Shell, store: str, output: Path | None, overwrite: bool) -> None:
    """Write a dataset card for the Hugging Face hub.

    A card is Markdown with the header that the hub reads.

    \b
    Example:
      demotools card GoToLocal -o README.md
    """
    from demotools.exchange.hub import store_card
    from demotools.output import write_output

    text = store_card(shell.store(store))
    if output is None:
        say(*text.removesuffix("\n").split("\n"))
        return
    write_output(output, text.encode(), overwrite=overwrite)
    shell.print({"path": output}, f"made {output}")


@click.command("push")
@click.argument("store")
@click.argument("place", metavar="hf:OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the dataset private, where it is new.")
@common
def push_command(shell: Shell, store: str, place: str, private: bool) -> None:
    """Publish a store on the Hugging Face hub.

    Sends the store's archive, and its card where the dataset has none. Needs the extra `hf`, and a
    token from `hf auth login` or $HF_TOKEN. `demotools fetch LEVEL --from
    hf:OWNER/NAME/STORE.zarr.zip` gets it back.

    \b
    Example:
      demotools push GoToLocal hf:me/babyai-demos
    """
    from demotools.exchange.hub import push_store

    files, url = push_store(shell.store(store), place, private=private, quiet=shell.quiet)
    shell.print({"files": files, "url": url}, f"published {', '.join(files)}: {url}")
