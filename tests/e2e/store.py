"""The model store of the repository, as tests find their way in it."""

from pathlib import Path

from tests.integration.server import ROOT


def newest_version(name: str) -> Path:
    """Return the folder of a model's highest version."""
    return max((path for path in (ROOT / "model_store" / name).iterdir() if path.name.isdigit()), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name)
