"""A model store with some of a version's variants, published by a rename as exports are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Variant = dict[str, Any]
MANIFEST = "manifest.json"


def publish_part(published: Path, store: Path, keep: Callable[[Variant], bool], version: str | None = None) -> Path:
    """Publish float32 ONNX variants under <store>/<model>/<version>. Returns that folder.

    version: default: that of the original.
    Raises: ValueError if `keep` selects no variant.
    """
    manifest = reduce_manifest(json.loads((published / MANIFEST).read_text()), keep)
    manifest["version"] = version or manifest["version"]
    folder: Path = store / manifest["name"] / manifest["version"]
    unfinished = folder.parent / f".{folder.name}.partial"
    unfinished.mkdir(parents=True)
    for name in manifest["files"]:
        _link(published / name, unfinished / name)
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2))
    unfinished.replace(folder)
    return folder


def reduce_manifest(manifest: dict[str, Any], keep: Callable[[Variant], bool]) -> dict[str, Any]:
    """Drop variants and the files that only they need. The default becomes the first variant if it was dropped.

    Raises: ValueError if `keep` selects no variant.
    """
    kept = [one for one in runnable(manifest) if keep(one)]
    if not kept:
        there = ", ".join(one["id"] for one in manifest["variants"])
        raise ValueError(f"{manifest['name']} {manifest['version']} has no such float32 ONNX variant; it has {there}")
    needed = {name for one in kept for name in (one["file"], *one["requires"], one.get("calibration"))}
    needed |= {part["file"] for part in (manifest["golden"], manifest.get("embedding")) if part}
    keys = [{"policy": one["policy"], "r": one["r"]} for one in kept]
    return {
        **manifest,
        "variants": kept,
        "files": {name: digest for name, digest in manifest["files"].items() if name in needed},
        "default": manifest["default"] if manifest["default"] in keys else keys[0],
    }


def runnable(manifest: dict[str, Any]) -> list[Variant]:
    """Return the variants that a service with default settings runs."""
    return [one for one in manifest["variants"] if (one["format"], one["precision"]) == ("onnx", "float32")]


def find_variant(manifest: dict[str, Any], policy: str, r: int) -> Variant:
    """Return the float32 ONNX variant. Raises: ValueError if there is none."""
    for variant in runnable(manifest):
        if (variant["policy"], variant["r"]) == (policy, r):
            return dict(variant)
    raise ValueError(f"policy {policy!r}, r = {r}: the version has no such float32 ONNX variant")


def rates_of(manifest: dict[str, Any], policy: str) -> list[int]:
    """Return the rates of a policy.

    Raises: ValueError for an unknown policy, or one without rates.
    """
    rates = sorted(one["r"] for one in runnable(manifest) if one["policy"] == policy and one["r"] is not None)
    if not rates:
        known = sorted({one["policy"] for one in runnable(manifest) if one["r"] is not None})
        where = f"{manifest['name']} {manifest['version']}"
        raise ValueError(f"policy {policy!r}: {where} has no such policy with rates; expected one of {known}")
    return rates


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # On another file system.
        shutil.copyfile(source, target)
