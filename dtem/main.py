"""Run a command: refuse bad requests in one line, return a status."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from dtem.commands import calibrate, compare, draw, evaluate, export, inspect, learn, prepare, serve, summary
from dtem.training import INTERRUPTED

SUCCESS, REFUSED = 0, 2
CONTEXT = {"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 100}
COMMANDS = (serve, prepare, inspect, learn, calibrate, export, evaluate, compare, summary, draw)


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in their own order, not by name."""
        return list(self.commands)


@click.group(cls=Commands, context_settings=CONTEXT, no_args_is_help=True)
@click.version_option(package_name="dtem-serve", message="%(package)s %(version)s")
def dtem() -> None:
    """Vision Transformer inference where each request chooses how much compute it is worth.

    \b
    dtem serve                                  serve the models of ./model_store
    dtem export --weights mine.pth --data val/ --name mine    publish your own model there
    """


for module in COMMANDS:
    dtem.add_command(module.command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status.

    Exit status: 0 success; 2 refused, with one line on standard error; 130 interrupted by Ctrl-C; `dtem serve` also
    returns 1 where the service cannot start. Exceptions that are no refusal propagate.
    """
    name, given = "dtem", list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = dtem.main(given, name, standalone_mode=False, obj=given)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return REFUSED
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else name
        print(f"{path}: {error.format_message()}", file=sys.stderr)
        return REFUSED
    except click.Abort:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return SUCCESS if status is None else int(status)
