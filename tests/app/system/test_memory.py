import mmap
from pathlib import Path

import pytest

from app.system.memory import MAX_AGE_SECONDS, MemoryGauge, free_bytes, used_bytes

MB = 1 << 20


def write_proc(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / "proc" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_used_bytes_counts_a_page_once_however_often_it_is_mapped(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(64 * MB))
    before = used_bytes()
    with (tmp_path / "weights").open("rb") as file:
        maps = [mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) for _ in range(4)]
    for each in maps:
        assert sum(each[:: mmap.PAGESIZE]) == 0
    # Resident memory grows by 256 MB.
    assert 60 * MB < used_bytes() - before < 120 * MB
    for each in maps:
        each.close()


def test_used_bytes_falls_back_to_resident_memory(tmp_path: Path) -> None:
    assert used_bytes(tmp_path) == 0
    write_proc(tmp_path, self__status="Name:\tpython\nVmRSS:\t  1000 kB\nThreads:\t3\n")
    assert used_bytes(tmp_path) == 1_024_000
    write_proc(tmp_path, self__smaps_rollup="55-7f ---p 00000000 00:00 0 [rollup]\nRss: 1000 kB\nPss: 400 kB\n")
    assert used_bytes(tmp_path) == 409_600


@pytest.mark.parametrize(("available_kb", "free"), [(10_000_000, 900_000_000 - 102_400_000), (100_000, 102_400_000)])
def test_free_bytes_respects_the_limit_and_other_processes(tmp_path: Path, available_kb: int, free: int) -> None:
    write_proc(tmp_path, self__cgroup="0::/\n", self__smaps_rollup="Pss: 100000 kB\n")
    write_proc(tmp_path, meminfo=f"MemTotal: 16000000 kB\nMemAvailable: {available_kb} kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1000000000\n")
    assert free_bytes(tmp_path) == free


def test_memory_gauge_reads_again_only_after_a_while() -> None:
    now, reads = 0.0, iter([1, 2, 3])
    gauge = MemoryGauge(lambda: next(reads), lambda: now)
    assert (gauge.read(), gauge.read()) == (1, 1)
    now = MAX_AGE_SECONDS + 1
    assert (gauge.read(), gauge.read()) == (2, 2)
