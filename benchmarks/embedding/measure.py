"""GMACs by formula and latency of the exported graphs, for both policies."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.servers.partial_store import find_variant
from benchmarks.timing import CLOCKS, Ratio, open_session, paired_ratio, time_interleaved
from training.models import load_vit, matching_macs, vit_macs

POLICIES = ("tome", "dtem")


@dataclass(frozen=True)
class Compute:
    """The cost of one rate. Units: GMACs per image. embedding: its rows, without the savings of narrower scores."""

    r: int
    tome: float
    dtem: float
    embedding: float


@dataclass(frozen=True)
class Latency:
    """One batch size at one rate, medians over rounds. Units: ms per batch; ratio of DTEM to ToMe by round."""

    r: int
    batch: int
    tome_ms: float
    dtem_ms: float
    ratio: Ratio


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises: ValueError."""
    manifest = read_manifest(options.published)
    compute = compare_compute(manifest, options.rates)
    latency = compare_latency(options.published, manifest, options.rates, options.batches, options)
    about = {
        "model": f"{manifest['name']} {manifest['version']}",
        "dim": manifest["embedding"]["dim"],
        **{name: getattr(options, name) for name in ("clock", "threads", "rounds")},
    }
    return {"about": about, "compute": [asdict(c) for c in compute], "latency": [asdict(t) for t in latency]}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises: ValueError if the version has no embedding."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    if not manifest.get("embedding"):
        raise ValueError(f"{folder} has no embedding: expected a version with policy dtem")
    return manifest


def compare_compute(manifest: dict[str, Any], rates: Sequence[int]) -> list[Compute]:
    """Compute the MACs by formula, and check them against those counted at export.

    Raises: ValueError if the two differ.
    """
    architecture, dim = manifest["architecture"], manifest["embedding"]["dim"]
    vit = load_vit(architecture["timm_name"], **architecture["timm_arguments"])
    rows = []
    for r in rates:
        gmacs = {}
        for policy in POLICIES:
            variant = find_variant(manifest, policy, r)
            matching = matching_macs(vit, variant["schedule"], embedding_dim=dim if policy == "dtem" else None)
            gmacs[policy] = (vit_macs(vit, variant["schedule"]) + matching) / 1e9
            if abs(gmacs[policy] / variant["gmacs"] - 1) > 1e-9:
                raise ValueError(f"{variant['id']}: {gmacs[policy]} GMACs by formula, {variant['gmacs']} at export")
        merging = [n for n, merged in zip(variant["tokens"], variant["schedule"], strict=False) if merged]
        rows.append(Compute(r, **gmacs, embedding=sum(merging) * architecture["width"] * dim / 1e9))
    return rows


def compare_latency(
    folder: Path, manifest: dict[str, Any], rates: Sequence[int], batches: Sequence[int], options: argparse.Namespace
) -> list[Latency]:
    """Time the graphs of both policies on the same pixels, interleaved."""
    rows = []
    height, width = manifest["input"]["height"], manifest["input"]["width"]
    for r in rates:
        files = {policy: folder / find_variant(manifest, policy, r)["file"] for policy in POLICIES}
        sessions = {policy: open_session(file, options.threads) for policy, file in files.items()}
        for batch in batches:
            pixels = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
            runs = {policy: functools.partial(s.run, ["logits"], {"pixels": pixels}) for policy, s in sessions.items()}
            seconds = time_interleaved(runs, options.rounds, CLOCKS[options.clock], f"r {r}, batch {batch}")
            tome_ms, dtem_ms = (1e3 * statistics.median(seconds[policy]) for policy in POLICIES)
            rows.append(Latency(r, batch, tome_ms, dtem_ms, paired_ratio(seconds["dtem"], seconds["tome"])))
    return rows
