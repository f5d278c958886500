import os
from pathlib import Path

import pytest

from app.cpus import count_cpus

PERIOD = 100_000


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.parametrize(("quota", "n_cpus"), [("max", 8), ("50000", 1), ("150000", 2), ("200000", 2), ("1600000", 8)])
def test_count_cpus_keeps_to_a_quota_of_version_2(tmp_path: Path, quota: str, n_cpus: int) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota} {PERIOD}\n")
    assert count_cpus(tmp_path) == n_cpus


@pytest.mark.parametrize("group", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize(("quota", "n_cpus"), [(-1, 8), (50_000, 1), (250_000, 3)])
def test_count_cpus_keeps_to_a_quota_of_version_1(tmp_path: Path, group: str, quota: int, n_cpus: int) -> None:
    folder = tmp_path / group
    folder.mkdir()
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text(f"{PERIOD}\n")
    assert count_cpus(tmp_path) == n_cpus


@pytest.mark.parametrize("text", ["", "nonsense", "0 0", "nan 100000"])
def test_count_cpus_falls_back_to_the_affinity(tmp_path: Path, text: str) -> None:
    assert count_cpus(tmp_path) == 8
    (tmp_path / "cpu.max").write_text(text)
    assert count_cpus(tmp_path) == 8
