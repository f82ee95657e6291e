"""`dsa keys`: makes, lists and revokes the keys of callers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from server.cli.options import fail

keys = typer.Typer(
    name="keys",
    help="Make, list and revoke the keys of callers, for dsa serve --keys FILE.",
    no_args_is_help=True,
    add_completion=False,
)

_File = Annotated[
    Path,
    typer.Option(
        "--keys", metavar="FILE", envvar="DSA_KEYS", show_default=False, help="The file, YAML or .json."
    ),
]
_Name = Annotated[str, typer.Argument(help="Stands for the caller in logs, metrics and the ledger.")]


@keys.command("new")
def new(
    name: _Name,
    file: _File,
    role: Annotated[
        Literal["user", "admin", "metrics"],
        typer.Option(help="user generates, admin changes settings, metrics reads /metrics."),
    ] = "user",
    again: Annotated[
        bool, typer.Option("--again", help="The key exists: give it another secret beside the old ones.")
    ] = False,
) -> None:
    """Make a key, and print its secret once. A server that runs takes it within seconds."""
    from server.access.edit import add_key
    from server.access.keys import KeysError

    try:
        typer.echo(add_key(file, name, role=role, again=again))
    except KeysError as error:
        fail(error)


@keys.command("list")
def show(file: _File) -> None:
    """List the keys: name, role, secrets that are valid, when made, when they end. No secret is known here."""
    from server.access.keys import KeysError, read_keys

    try:
        table = read_keys(file)
    except KeysError as error:
        fail(error)
    for record in table.keys:
        created = "-" if record.created is None else f"{record.created:%Y-%m-%d}"
        expires = "-" if record.expires is None else f"{record.expires:%Y-%m-%d}"
        typer.echo(f"{record.name}\t{record.role}\t{len(record.sha256)}\t{created}\t{expires}")


@keys.command("revoke")
def revoke(
    name: _Name,
    file: _File,
    old: Annotated[
        bool, typer.Option("--old", help="Only the older secrets, after --again made a newer one.")
    ] = False,
) -> None:
    """Take a key out of the file. A server that runs refuses it within seconds; answers that run go on."""
    from server.access.edit import revoke_key
    from server.access.keys import KeysError

    try:
        count = revoke_key(file, name, old=old)
    except KeysError as error:
        fail(error)
    typer.echo(f"revoked: {count} secret{'' if count == 1 else 's'} of {name}")
