"""Commit: which one a report and its models belong to. The kit's note goes before git's answer: a copied tree may have
the history of an earlier commit, or none.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from deploy.local.process import ROOT

KIT = Path(".gpu-kit")
COMMIT_FILE = "commit"
UNKNOWN = "unknown"


def read_commit(root: Path = ROOT) -> str:
    """Return the kit's commit, else git's; "unknown" without either."""
    noted = root / KIT / COMMIT_FILE
    return noted.read_text(encoding="ascii").strip() if noted.is_file() else read_git_commit(root)


def read_git_commit(root: Path = ROOT) -> str:
    """Return git's commit, with -dirty behind it where tracked files differ; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return found.stdout.strip()
