"""deploy/README.md lists every setting as app/settings.py defines it."""

import dataclasses
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from app.settings import PREFIX, Settings, read_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "deploy/README.md").read_text(encoding="utf-8")
TEXTS = (".md", ".env", ".yml", ".yaml", "")
HEAD = "| setting | default | unit | accepted | |\n|---|---|---|---|---|\n"
UNITS = {
    "_ms": "ms",
    "_seconds": "s",
    "_bytes": "bytes",
    "_pixels": "pixels",
    "_images": "images",
    "_threads": "threads",
}


def describe(name: str, field: FieldInfo) -> str:
    """Make the table row of a setting."""
    # Every setting has a default.
    assert field.default is not PydanticUndefined, name
    default = "" if field.default is None else f"`{write_value(field.default)}`"
    unit = next((unit for suffix, unit in UNITS.items() if name.endswith(suffix)), "")
    text = (field.description or "").replace("<", "&lt;")
    return f"| `{PREFIX}{name.upper()}` | {default} | {unit} | {accepted(field)} | {text} |"


def write_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def accepted(field: FieldInfo) -> str:
    """Describe the accepted values: a list or a range."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(field.annotation))
    if isinstance(field.json_schema_extra, dict) and isinstance(words := field.json_schema_extra.get("enum"), list):
        return ", ".join(f"`{word}`" for word in words)
    bounds = {type(bound): dataclasses.astuple(bound)[0] for bound in field.metadata}
    if Ge in bounds and Le in bounds:
        return f"{bounds[Ge]} … {bounds[Le]}"
    return next((f"{sign} {bounds[kind]}" for kind, sign in ((Ge, "≥"), (Gt, ">")) if kind in bounds), "")


def test_every_setting_is_in_the_table() -> None:
    rows = "\n".join(describe(name, field) for name, field in Settings.model_fields.items()) + "\n"
    assert HEAD + rows + "\n" in README, f"expected table:\n{HEAD}{rows}"


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
