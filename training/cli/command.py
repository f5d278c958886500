"""One way to run a command: parse the options, refuse a bad request in one line, return an exit status.

This module imports the standard library only, so that commands outside `training.cli` can use it.
"""

from __future__ import annotations

import argparse
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

    Exit status: 0 success; 2 refused, with one line on standard error; 130 interrupted by Ctrl-C.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        return run(options) or SUCCESS
    except (ValueError, OSError, *refusals) as err:
        print(f"{name} refused: {' '.join(str(err).split())}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{name} interrupted", file=sys.stderr)
        return INTERRUPTED
