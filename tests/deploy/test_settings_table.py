"""deploy/README.md lists every setting as app/settings.py defines it."""

import re
from pathlib import Path

import pytest

from app.settings import PREFIX, Settings, read_settings
from deploy.settings_table import README, update

ROOT = Path(__file__).parents[2]
TEXTS = (".md", ".env", ".yml", ".yaml", "")


def test_settings_table_is_generated() -> None:
    page = README.read_text(encoding="utf-8")
    assert update(page) == page, "run: python -m deploy.settings_table"


def test_every_setting_named_in_a_file_exists() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    pages = [ROOT / "README.md", ROOT / "Dockerfile", *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*.*")]
    for page in pages:
        if page.suffix not in TEXTS:
            continue
        named = set(re.findall(r"\bDTEM_[A-Z][A-Z_]*[A-Z]\b", page.read_text(encoding="utf-8")))
        assert named <= known, f"{page}: {named - known}"


def test_compose_settings_file_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Including its commented examples."""
    lines = (ROOT / "deploy/settings.env").read_text(encoding="utf-8").splitlines()
    examples = dict(line.lstrip("# ").split("=", 1) for line in lines if re.match(r"#? ?DTEM_\w+=", line))
    assert examples
    for name, value in examples.items():
        monkeypatch.setenv(name, value)
    read_settings()
