"""Settings table: the table of `deploy/README.md`, generated from `app/settings.py`.

`python -m deploy.settings_table` rewrites it.
"""

import dataclasses
from pathlib import Path
from typing import Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from app.settings import PREFIX, Settings

README = Path(__file__).parent / "README.md"
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
    if field.is_required():
        raise ValueError(f"setting {name}: expected a default")
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


def update(page: str) -> str:
    """Return the page with a new table in the place of its old one."""
    before, _, after = page.partition(HEAD)
    rows = "".join(describe(name, field) + "\n" for name, field in Settings.model_fields.items())
    return before + HEAD + rows + after[after.index("\n\n") + 1 :]


if __name__ == "__main__":
    README.write_text(update(README.read_text(encoding="utf-8")), encoding="utf-8")
