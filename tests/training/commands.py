"""Run `dtem` in the process of a test."""

from collections.abc import Sequence

from dtem.main import main


def dtem(command: str, arguments: Sequence[str]) -> int:
    """Return the exit status."""
    return main([command, *arguments])
