"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

WRITTEN = "What is written"

CheckpointPath: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A safetensors file, a .pt or .pth state dict, a sharded checkpoint's index, or a folder with one.",
        show_default=False,
    ),
]
JsonPath: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT", help="Write a JSON object; - is standard output.", show_default=False, rich_help_panel=WRITTEN
    ),
]
