"""The command ``normscope``: every error is one line on standard error."""

from __future__ import annotations

import sys

from normscope.errors import NormscopeError, require

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad input, 130 after Ctrl-C.

    Args:
        arguments: what follows ``normscope``; by default the process's own arguments.
    """
    try:
        require("rich", "cli")
        typer = require("typer", "cli")
        from normscope.cli.app import app
    except NormscopeError as error:
        return _fail(str(error))
    try:
        return app(arguments, prog_name="normscope", standalone_mode=False) or 0
    except NormscopeError as error:
        return _fail(str(error))
    except typer.BadParameter.__mro__[2] as error:  # ClickException, which typer does not export under one name
        return _fail(error.format_message())
    except KeyboardInterrupt:
        return INTERRUPTED


def _fail(message: str) -> int:
    print(f"normscope: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT
