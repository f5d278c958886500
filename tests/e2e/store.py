"""Paths in the model store of the repository."""

from pathlib import Path

from tests.integration.server import ROOT
from training.cli import model_options


def newest_version(name: str) -> Path:
    """Return the folder of a model's highest version."""
    folder = model_options.newest_version(ROOT / "model_store" / name)
    assert folder is not None
    return folder
