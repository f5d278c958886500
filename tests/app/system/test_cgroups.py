import os
from pathlib import Path

import pytest

from app.system.cgroups import count_cpus, memory_limit_bytes

MACHINE = memory_limit_bytes(Path("/nowhere"))
IN_V2 = "0::/\n"
IN_V1 = "9:name=systemd:/\n4:memory:/docker/1\n2:cpuset:/\n1:cpu,cpuacct:/docker/1\n0::/\n"


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def write_membership(root: Path, text: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)


def write_cgroup(root: Path, name: str, text: str) -> None:
    path = root / "sys/fs/cgroup" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(("quota", "n_cpus"), [("max", 8), ("50000", 1), ("150000", 2), ("200000", 2), ("1600000", 8)])
def test_count_cpus_respects_a_quota_of_version_2(tmp_path: Path, quota: str, n_cpus: int) -> None:
    write_membership(tmp_path, IN_V2)
    write_cgroup(tmp_path, "cpu.max", f"{quota} 100000\n")
    assert count_cpus(tmp_path) == n_cpus


@pytest.mark.parametrize(("quota", "n_cpus"), [(-1, 8), (50_000, 1), (250_000, 3)])
def test_count_cpus_respects_a_quota_of_version_1(tmp_path: Path, quota: int, n_cpus: int) -> None:
    write_membership(tmp_path, IN_V1)
    write_cgroup(tmp_path, "cpu,cpuacct/cpu.cfs_quota_us", f"{quota}\n")
    write_cgroup(tmp_path, "cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert count_cpus(tmp_path) == n_cpus


def test_count_cpus_takes_the_minimum_over_ancestor_groups(tmp_path: Path) -> None:
    write_membership(tmp_path, "0::/system.slice/dtem.service\n")
    write_cgroup(tmp_path, "system.slice/cpu.max", "200000 100000\n")
    write_cgroup(tmp_path, "system.slice/dtem.service/cpu.max", "400000 100000\n")
    assert count_cpus(tmp_path) == 2


@pytest.mark.parametrize("text", ["", "nonsense", "0 0", "100000"])
def test_count_cpus_falls_back_to_the_affinity(tmp_path: Path, text: str) -> None:
    assert count_cpus(tmp_path) == 8
    write_membership(tmp_path, IN_V2)
    assert count_cpus(tmp_path) == 8
    write_cgroup(tmp_path, "cpu.max", text)
    assert count_cpus(tmp_path) == 8


def test_memory_limit_is_the_minimum_over_ancestor_groups(tmp_path: Path) -> None:
    write_membership(tmp_path, "0::/system.slice/dtem.service\n")
    write_cgroup(tmp_path, "system.slice/dtem.service/memory.max", "max\n")
    assert memory_limit_bytes(tmp_path) == MACHINE
    write_cgroup(tmp_path, "system.slice/memory.max", "1000000\n")
    assert memory_limit_bytes(tmp_path) == 1_000_000
    write_cgroup(tmp_path, "system.slice/dtem.service/memory.max", "500000\n")
    assert memory_limit_bytes(tmp_path) == 500_000


def test_memory_limit_of_a_version_1_container_is_its_own(tmp_path: Path) -> None:
    write_membership(tmp_path, IN_V1)
    write_cgroup(tmp_path, "memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert memory_limit_bytes(tmp_path) == MACHINE
    write_cgroup(tmp_path, "memory/memory.limit_in_bytes", "2000000\n")
    assert memory_limit_bytes(tmp_path) == 2_000_000


def test_memory_limit_without_groups_is_that_of_the_machine(tmp_path: Path) -> None:
    assert MACHINE > 100e6
    assert memory_limit_bytes(tmp_path) == MACHINE
