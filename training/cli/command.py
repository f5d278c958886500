"""Run the command of a study or a benchmark: parse options, refuse bad requests in one line, return a status.

This module imports the standard library only. The commands that users run are in `dtem`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

SUCCESS, REFUSED, INTERRUPTED = 0, 2, 130


def run_command(
    name: str,
    description: str | None,
    add_options: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None = None,
    *,
    refusals: tuple[type[Exception], ...] = (),
) -> int:
    """Parse the arguments, run the command, and return the exit status.

    name: what is refused, as in "export refused: …". run: may return a status; None means success.
    refusals: exceptions that refuse the request, besides ValueError and OSError. Others propagate.
    The options get `command_line`, which repeats the command, for reports.

    Exit status: 0 success; 2 refused, with one line on standard error; 130 interrupted by Ctrl-C.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    options.command_line = shlex.join(["python", "-m", _module(run), *arguments])
    refused: tuple[type[Exception], ...] = (ValueError, OSError, *refusals)
    try:
        return run(options) or SUCCESS
    except refused as err:
        print(f"{name} refused: {' '.join(str(err).split())}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{name} interrupted", file=sys.stderr)
        return INTERRUPTED


def report(title: str, summary: str, command_line: str, body: str) -> str:
    """Return a Markdown document: title, one sentence, the command that made it, result."""
    return f"# {title}\n\n{summary}\n\n```\n{command_line}\n```\n\n{body}"


def _module(run: Callable[..., object]) -> str:
    """Return the module of a command, also where Python runs it as __main__."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return str(spec.name) if run.__module__ == "__main__" and spec is not None else run.__module__
