"""``hzo zoo``: sweep the model families of installed libraries."""

from __future__ import annotations

import typer

from hzo_lab.cli.commands import app
from hzo_lab.zoo import command


@app.command(
    "zoo",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def zoo_command(context: typer.Context) -> None:
    """Try the gradients of model families that others wrote, against autograd; see hzo zoo --help."""
    raise typer.Exit(command.main(context.args))
