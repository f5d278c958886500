"""Provenance: which code and which packages made something. Standard library only."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def package_version(package: str) -> str | None:
    """Return the version of an installed package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit(folder: Path = Path(__file__).parent, *, marks_changes: bool = False) -> str | None:
    """Return the commit of this code, None where it is in no git checkout.

    marks_changes: append "-dirty" where files differ from the commit.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie in a checkout of something else, which does not track it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--abbrev=40", "--exclude=*", *(["--dirty"] if marks_changes else []))
    except (OSError, subprocess.CalledProcessError):
        return None
