import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load.http1 import make_request
from benchmarks.load.single_client import Latency, read_work_ms
from benchmarks.options import read_setting
from benchmarks.overhead.__main__ import main
from benchmarks.overhead.measure import BATCHES, summarise_single_client
from benchmarks.overhead.report import draw_figure, fastest_loop, overhead, ratio, tables
from benchmarks.spread import percentile, spread
from tests.app.tiny_store import write_store

SMALL = ["--policy", "tome", "--rates", "16", "--seconds", "1", "--rounds", "1", "--connections", "4"]


def throughput(index: int, arm: str, per_second: float) -> dict[str, Any]:
    row = {"r": 16, "round": index, "arm": arm, "per_second": per_second, "cpu_ms": 2.0}
    return {**row, "client_cpu_ms": None, "p50_ms": None, "p99_ms": None}


def single_client(index: int, arm: str, total_ms: float, work_ms: float | None) -> dict[str, Any]:
    overhead_ms = None if work_ms is None else total_ms - work_ms
    row = {"r": 16, "round": index, "arm": arm, "total_ms": total_ms}
    return {**row, "work_ms": work_ms, "overhead_ms": overhead_ms}


THROUGHPUT = [
    *(
        throughput(1, arm, value)
        for arm, value in (("service", 90), ("bare loop, batch 1", 120), ("bare loop, batch 8", 100))
    ),
    *(
        throughput(2, arm, value)
        for arm, value in (("service", 100), ("bare loop, batch 1", 80), ("bare loop, batch 8", 200))
    ),
]
SINGLE_CLIENT = [
    single_client(1, "service", 10, 8),
    single_client(1, "plain FastAPI", 12, None),
    single_client(1, "bare loop", 7, None),
    single_client(2, "service", 30, 29),
    single_client(2, "plain FastAPI", 13, None),
    single_client(2, "bare loop", 28, None),
]


def test_the_fastest_loop_has_the_highest_median_and_ratios_are_within_rounds() -> None:
    assert fastest_loop(THROUGHPUT, 16) == "bare loop, batch 8"
    found = ratio(THROUGHPUT, 16, "service", "bare loop, batch 8")
    assert [found.min, found.median, found.max] == pytest.approx([0.5, 0.7, 0.9])


def test_overhead_is_reported_twice_for_a_server_with_timings() -> None:
    own = overhead(SINGLE_CLIENT, 16, "service")
    assert own.reported is not None
    assert (own.reported.min, own.reported.max) == (1, 2)
    assert (own.over_loop.min, own.over_loop.max) == (2, 3)
    assert overhead(SINGLE_CLIENT, 16, "plain FastAPI").reported is None


def test_the_report_has_every_arm() -> None:
    about: dict[str, Any] = {
        "model": "m",
        "policy": "tome",
        "n_images": 4,
        "connections": 8,
        "threads": 2,
        "rounds": 2,
        "seconds": 1,
    }
    content = {
        "about": {**about, "setting": [["max_batch_images", "16"]]},
        "throughput": THROUGHPUT,
        "single_client": SINGLE_CLIENT,
    }
    table = tables(content)
    assert "| 16 | **bare loop, batch 8** | 150.0 (100.0 … 200.0) | 1.000 (1.000 … 1.000) |" in table
    assert "max_batch_images=16" in table
    assert len(draw_figure(content).axes) == 2


def test_work_is_read_from_the_server_timing_header() -> None:
    head = b"HTTP/1.1 200 OK\r\nserver-timing: decode;dur=1.5, queue;dur=9, inference;dur=2.25, total;dur=13\r\nx: y"
    assert read_work_ms(head) == pytest.approx(3.75)
    assert read_work_ms(b"HTTP/1.1 200 OK\r\nserver-timing: total;dur=13\r\n") is None
    assert read_work_ms(b"HTTP/1.1 200 OK\r\n") is None


def test_a_single_client_is_summarised_by_medians() -> None:
    found = summarise_single_client([Latency(10, 8), Latency(20, 11), Latency(12, 11)], 16, 1, "service")
    assert (found.total_ms, found.work_ms, found.overhead_ms) == (12, 11, 2)


def test_a_request_has_the_length_of_its_body() -> None:
    head, _, body = make_request("/classify?r=16", b"12345").partition(b"\r\n\r\n")
    assert head.startswith(b"POST /classify?r=16 HTTP/1.1\r\n")
    assert b"Content-Length: 5" in head
    assert body == b"12345"


def test_spreads_and_percentiles() -> None:
    assert spread([3, 1, 2]).text(1, " ms") == "2.0 ms (1.0 … 3.0)"
    assert percentile([1, 2, 3], 50) == 2
    assert percentile([], 50) is None


def test_settings_are_names_and_values() -> None:
    assert read_setting("DTEM_MAX_BATCH_IMAGES=16") == ("max_batch_images", "16")
    for text, message in (
        ("max_batch_images", "NAME=VALUE"),
        ("=1", "NAME=VALUE"),
        ("DTEM_PORT=1", "set by the benchmark"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            read_setting(text)


def test_a_missing_wrk_is_refused_with_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(SMALL) == 2
    assert "wrk is not installed" in capsys.readouterr().err


def test_a_rate_without_a_graph_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    folder = write_store(tmp_path)
    assert main([*SMALL, "--published", str(folder), "--rates", "3"]) == 2
    assert "r = 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_all_arms_are_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_store(tmp_path / "store")
    out = tmp_path / "overhead"
    assert main([*SMALL, "--published", str(folder), "--n-images", "3", "--out", str(out)]) == 0
    content = json.loads(out.with_suffix(".json").read_text())
    arms = {"service", "plain FastAPI", *(f"bare loop, batch {size}" for size in BATCHES)}
    assert {row["arm"] for row in content["throughput"]} == arms
    assert all(row["per_second"] > 0 for row in content["throughput"])
    own = next(row for row in content["single_client"] if row["arm"] == "service")
    assert 0 < own["work_ms"] < own["total_ms"]
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "service" in out.with_suffix(".md").read_text()
    refused = [*SMALL, "--published", str(folder), "--n-images", "3", "--setting", "no_such=1"]
    assert main(refused) == 2
    assert "DTEM_NO_SUCH: no such setting" in capsys.readouterr().err
