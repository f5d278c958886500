"""Rounds of a new Compose stack each, with all variants at saturation and with a single client."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.errors import MeasurementError
from benchmarks.host import describe_host
from benchmarks.load.labelled_jpegs import draw_jpegs, write_jpegs
from benchmarks.load.wrk import find_wrk, saturate, write_script
from deploy.local.compose import ComposeStack, build_image

SERVICES = ("api", "prometheus")
PROJECT = "dtem-sizing"
# Three scrapes.
REST_SECONDS = 15.0
WARM_UP_SECONDS = 1


@dataclass(frozen=True)
class Start:
    """One start of the stack. Units: seconds until the service was ready, and until Docker's checks were healthy.

    bytes_at_rest, bytes_under_load: resident memory by Compose service.
    """

    round: int
    ready_seconds: float
    healthy_seconds: float
    bytes_at_rest: dict[str, int]
    bytes_under_load: dict[str, int]


@dataclass(frozen=True)
class VariantLoad:
    """One variant in one round, at saturation and with a single client. Units: ms."""

    policy: str
    r: int | None
    round: int
    per_second: float
    p50_ms: float
    p99_ms: float
    single_client_ms: float


@dataclass(frozen=True)
class Setup:
    """What all rounds share. model: as query parameters."""

    wrk: str
    script: Path
    model: str
    n_connections: int
    seconds: int


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises: MeasurementError, LaunchError."""
    wrk = find_wrk()
    manifest = json.loads((options.published / "manifest.json").read_text())
    variants = find_variants(manifest, options.policies.split(","))
    model = f"model={manifest['name']}&version={manifest['version']}"
    build_image()
    starts: list[Start] = []
    loads: list[VariantLoad] = []
    with tempfile.TemporaryDirectory(prefix="dtem-sizing-") as name:
        files = write_jpegs(Path(name) / "images", draw_jpegs(options.n_images))
        script = write_script(Path(name) / "post.lua", files)
        setup = Setup(wrk, script, model, options.connections, options.seconds)
        for index in tqdm(range(options.rounds), unit="round"):
            start, more = measure_round(setup, variants, index)
            starts, loads = [*starts, start], loads + more
    about = {name: getattr(options, name) for name in ("seconds", "rounds", "connections", "n_images")}
    about |= {"model": str(options.published), "host": describe_host()}
    return {"about": about, "starts": [asdict(one) for one in starts], "variants": [asdict(one) for one in loads]}


def measure_round(setup: Setup, variants: Sequence[dict[str, Any]], index: int) -> tuple[Start, list[VariantLoad]]:
    with ComposeStack(PROJECT, SERVICES) as stack:
        time.sleep(REST_SECONDS)
        at_rest = {service: stack.resident_bytes(service) for service in SERVICES}
        loads = [measure_variant(setup, stack, variant, index) for variant in variants]
        under_load = {service: stack.resident_bytes(service) for service in SERVICES}
    return Start(index, stack.ready_seconds, stack.healthy_seconds, at_rest, under_load), loads


def measure_variant(setup: Setup, stack: ComposeStack, variant: dict[str, Any], index: int) -> VariantLoad:
    policy, r = variant["policy"], variant["r"]
    rate = "" if r is None else f"&r={r}"
    url = f"http://127.0.0.1:{stack.ports['api']}/classify?{setup.model}&policy={policy}{rate}"
    saturate(setup.wrk, setup.script, url, setup.n_connections, WARM_UP_SECONDS)
    full = saturate(setup.wrk, setup.script, url, setup.n_connections, setup.seconds)
    single_client = saturate(setup.wrk, setup.script, url, 1, setup.seconds)
    return VariantLoad(policy, r, index, full.per_second, full.p50_ms, full.p99_ms, single_client.p50_ms)


def find_variants(manifest: dict[str, Any], policies: Sequence[str]) -> list[dict[str, Any]]:
    """Return the ONNX variants of these policies, in the order of the manifest.

    Raises: MeasurementError if a policy has none.
    """
    found = [one for one in manifest["variants"] if one["format"] == "onnx" and one["policy"] in policies]
    missing = set(policies) - {variant["policy"] for variant in found}
    if missing:
        known = ", ".join(dict.fromkeys(one["policy"] for one in manifest["variants"]))
        raise MeasurementError(
            f"{manifest['name']} has no graph of policy {', '.join(sorted(missing))}; expected some of {known}"
        )
    return found
