"""`dsa serve`: reads the settings and runs the server."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.options import fail, with_settings
from server.settings import ADVANCED, SettingsError, load_settings


@with_settings
def serve(
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file with any of these settings, under the names of the flags. Flags win over "
            "DSA_<NAME> in the environment, which wins over the file.",
            rich_help_panel=ADVANCED,
            metavar="FILE",
        ),
    ] = None,
    **flags: Any,
) -> None:
    """Serve a model over HTTP, with OpenAI's interface.

    Without a MODEL it fetches a small one (93 MB, once) and serves that.
    """
    from server.hub.models import ModelError
    from server.listen import ServeError
    from server.serve import serve as run
    from server.text.tokenizer import TokenizerError

    try:
        settings = load_settings(flags, os.environ, config)
    except SettingsError as error:
        fail(error, 2)
    try:
        code = run(settings)
    except (ServeError, ModelError, TokenizerError, ValueError) as error:
        code = 2 if isinstance(error, SettingsError) else 1
        if settings.log_format == "text":
            fail(error, code)
        logging.getLogger("server.serve").critical("%s", error)
    raise typer.Exit(code)
