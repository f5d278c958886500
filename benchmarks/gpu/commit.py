"""The commit that a report and its models belong to: git's, or what the kit noted of it where there is no git."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.served import ROOT

KIT = Path(".gpu-kit")
COMMIT_FILE = "commit"
UNKNOWN = "unknown"


def read_commit(root: Path = ROOT) -> str:
    """Return the commit; "unknown" where neither git nor the kit tells it."""
    noted = root / KIT / COMMIT_FILE
    commit = read_git_commit(root)
    if commit != UNKNOWN or not noted.is_file():
        return commit
    return noted.read_text(encoding="ascii").strip()


def read_git_commit(root: Path = ROOT) -> str:
    """Return git's commit, with -dirty behind it where tracked files differ; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return found.stdout.strip()
