import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.errors import MeasurementError
from benchmarks.sizing.__main__ import main
from benchmarks.sizing.measure import find_variants
from benchmarks.sizing.report import draw_figure, tables

MANIFEST: dict[str, Any] = json.loads(Path("model_store/reference/5/manifest.json").read_text())


def load(r: int | None, index: int, per_second: float) -> dict[str, Any]:
    row = {"policy": "dtem", "r": r, "round": index, "per_second": per_second}
    return {**row, "p50_ms": 10.0, "p99_ms": 20.0, "single_client_ms": 5.0}


def start(index: int, ready_seconds: float) -> dict[str, Any]:
    memory = {"bytes_at_rest": {"api": 800_000_000}, "bytes_under_load": {"api": 900_000_000}}
    return {"round": index, "ready_seconds": ready_seconds, "healthy_seconds": 12.0, **memory}


CONTENT: dict[str, Any] = {
    "about": {"model": "m", "seconds": 1, "rounds": 2, "connections": 32, "n_images": 4, "host": {"cores": 2}},
    "starts": [start(0, 6.0), start(1, 7.0)],
    "variants": [load(r, index, value + 10 * index) for index in (0, 1) for r, value in ((16, 100), (None, 200))],
}


def test_the_report_has_every_variant_and_the_start() -> None:
    table = tables(CONTENT)
    assert "| dtem | 16 | 105.0 (100.0 … 110.0) | 52 |" in table
    assert "| dtem | adaptive | 205.0 (200.0 … 210.0) | 102 |" in table
    assert "| ready, s | 6.5 (6.0 … 7.0) |" in table
    assert "| memory of api after the load, MB | 900 (900 … 900) |" in table
    assert len(draw_figure(CONTENT).axes) == 2


def test_find_variants_refuses_a_policy_that_was_not_exported() -> None:
    assert [variant["r"] for variant in find_variants(MANIFEST, ["none", "atm"])] == [0, None]
    with pytest.raises(MeasurementError, match="no graph of policy magic"):
        find_variants(MANIFEST, ["none", "magic"])


@pytest.mark.container
def test_sizing_measures_the_stack(tmp_path: Path) -> None:
    out = tmp_path / "sizing"
    short = ["--rounds", "1", "--seconds", "1", "--n-images", "2", "--policies", "none"]
    assert main([*short, "--out", str(out)]) == 0
    content = json.loads(out.with_suffix(".json").read_text())
    (row,) = content["variants"]
    assert row["per_second"] > 1
    assert content["starts"][0]["bytes_at_rest"]["api"] > 100e6
