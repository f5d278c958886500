"""The plan of an export, and what can be refused before a model is loaded. Imports no PyTorch."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

CLASSIFY, FLOAT32 = "classify", "float32"
USUAL_R = 8
"""The default rate is the nearest to it."""


def manifest_schema() -> dict[str, Any]:
    """Return the JSON Schema of manifests, the contract with the service."""
    schema: dict[str, Any] = json.loads((files("training.export") / "manifest.schema.json").read_text("utf-8"))
    return schema


@dataclass(frozen=True)
class Plan:
    """The name, rates, formats and tolerances of an export. Units: tolerances in logits

    task: a name in `TASKS`. activation: from logits to probabilities. default_r: None means the
        rate above 0 that is nearest to 8.
    default_policy: None means dtem where there is an embedding, else tome.
    git_commit: of the code that exports; None asks git. device: on which graphs are measured.
    """

    name: str
    version: str
    rates: tuple[int, ...]
    timm_name: str = ""
    timm_arguments: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    default_r: int | None = None
    default_policy: str | None = None
    formats: tuple[str, ...] = ("onnx",)
    precisions: tuple[str, ...] = (FLOAT32,)
    parity_tolerance: float = 1e-4
    golden_tolerance: float = 1e-3
    git_commit: str | None = None
    task: str = CLASSIFY
    activation: str = "softmax"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.rates or len(set(self.rates)) != len(self.rates) or min(self.rates) < 0:
            raise ValueError(f"rates {list(self.rates)}: expected distinct numbers of at least 0")
        if self.default_r is not None and self.default_r not in self.rates:
            raise ValueError(f"default_r {self.default_r}: expected one of the rates {list(self.rates)}")
        for name in ("parity_tolerance", "golden_tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: expected a number above 0")

    def default_of(self, rates: list[int]) -> int:
        """Return the default among the rates of a policy. Raises: ValueError where it is not among them."""
        if self.default_r is None:
            return min(rates, key=lambda r: (r == 0, abs(r - USUAL_R), r))
        if self.default_r not in rates:
            raise ValueError(f"default_r {self.default_r}: expected one of {rates}, the rates of the default policy")
        return self.default_r

    def target(self, store: Path) -> Path:
        return store / self.name / self.version

    def work(self, store: Path) -> Path:
        """Return the folder of the unfinished version, next to it."""
        return self.target(store).with_name(f".{self.version}.unfinished")


def check_plan(plan: Plan, store: Path) -> None:
    """Refuse what no model is needed to refuse, in less than a second, and leave nothing behind.

    Raises: ValueError for a name, version, format or precision that does not exist; FileExistsError
        where the version exists (versions are immutable); PermissionError or NotADirectoryError
        where the store is not a folder that can be written to.
    """
    fields = manifest_schema()["properties"]
    _check_name(
        "name", plan.name, fields["name"], "lower-case letters, digits, '.', '_' and '-', first a letter or digit"
    )
    _check_name("version", plan.version, fields["version"], "a whole number from 1, such as 1")
    if plan.target(store).exists():
        raise FileExistsError(f"{plan.target(store)} exists, and versions are immutable: choose another version")
    parent = next(folder for folder in (store / plan.name, *(store / plan.name).absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"store {store}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"store {store}: {parent} cannot be written to: change its owner or mode, or --store")


def _check_name(field: str, value: str, rule: dict[str, Any], expected: str) -> None:
    longest = rule.get("maxLength", len(value))
    if not re.search(rule["pattern"], value) or len(value) > longest or value.endswith("\n"):
        limit = f", at most {longest} characters" if "maxLength" in rule else ""
        raise ValueError(f"{field} {value!r}: expected {expected}{limit}")


def next_version(store: Path, name: str) -> str:
    """Return the number of the next version."""
    folder = store / name
    taken = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return str(max(taken, default=0) + 1)
