"""Run a command of the training half, whose packages need not be installed."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import requires
from typing import Any

import click

from training.cli.options import ModelOptions

INTERRUPTED, PIPE_CLOSED = 130, 141


def run_training(
    command: str,
    /,
    model: ModelOptions | None = None,
    *,
    check: Callable[[Namespace], None] = lambda options: None,
    **options: Any,
) -> int:
    """Run `training.cli.<command>`, and return its exit status.

    check: what can be refused before the packages of the training half are imported, which takes seconds.
    The options get `command_line`, which repeats the command, for reports.
    Raises: click.UsageError where the request is refused, or packages are missing.
    """
    context = click.get_current_context()
    chosen = Namespace(**options, command_line=shlex.join(["dtem", *context.find_root().obj]))
    refusals: tuple[type[Exception], ...] = (ValueError, OSError)
    try:
        check(chosen)
        if model is not None:
            model.require_data()
        body = import_module(f"training.cli.{command}")
        refusals += getattr(body, "REFUSALS", ())
        return int(body.run(chosen) if model is None else body.run(model, chosen))
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("training", "app", "dtem"):
            raise
        raise click.UsageError(explain_missing(str(error.name)), context) from error
    except BrokenPipeError:
        # The reader of our output, such as `head`, has gone. Python would report that again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except refusals as error:
        raise click.UsageError(describe(error), context) from error
    except KeyboardInterrupt:
        click.echo(f"dtem {command}: interrupted; run the same command again to go on", err=True)
        return INTERRUPTED


def describe(error: Exception) -> str:
    """Return the message in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def explain_missing(package: str) -> str:
    """Say how to install the packages of the training half."""
    wanted = [line.partition(";")[0].strip() for line in requires("dtem-serve") or [] if "training" in line]
    return (
        f"the package {package} is missing; install the training half: python -m pip install {' '.join(wanted)} "
        f"(without a GPU, `uv pip install --torch-backend cpu …` installs the CPU build of torch)"
    )
