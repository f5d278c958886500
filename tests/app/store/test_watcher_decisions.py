import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.store.loader import choose_default
from app.store.watcher import Signature, Version, compare, keep_last, scan
from tests.app.tiny_store import write_store

versions = st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(1, 3))
signatures = st.sampled_from([(("manifest.json", n, 10),) for n in range(2)])
states = st.dictionaries(versions, signatures)


@given(states, states, states)
def test_compare_loads_new_versions_unless_refused_in_the_same_state(
    found: dict[Version, Signature], served: dict[Version, Signature], refused: dict[Version, Signature]
) -> None:
    changes = compare(found, served, refused)
    for version in {*found, *served, *refused}:
        is_new = version in found and version not in served
        assert (version in changes.load) == (is_new and refused.get(version) != found[version])
        assert (version in changes.drop) == (version in served and version not in found)
        is_both = version in found and version in served
        assert (version in changes.altered) == (is_both and found[version] != served[version])


@given(states, states, states)
def test_compare_is_idempotent(
    found: dict[Version, Signature], served: dict[Version, Signature], refused: dict[Version, Signature]
) -> None:
    first = compare(found, served, refused)
    loaded, bad = first.load[::2], first.load[1::2]
    kept = {version: found[version] for version in [*served, *loaded] if version in found}
    again = compare(found, kept, refused | {version: found[version] for version in bad})
    assert (again.load, again.drop, again.altered) == ([], [], [])


@given(st.sets(versions, min_size=1), st.sets(versions))
def test_default_model_always_keeps_a_version(served: set[Version], gone: set[Version]) -> None:
    default = choose_default({name for name, _ in served}, None)
    kept = keep_last(served, gone, default)
    left = (served - gone) | ({kept} if kept else set())
    assert default in {name for name, _ in left}
    if kept:
        assert kept == max(version for version in served if version[0] == default)
        assert kept in gone


def test_choose_default_returns_the_configured_model_or_the_first_by_name() -> None:
    assert choose_default(["b", "a"], None) == "a"
    assert choose_default(["b", "a"], "b") == "b"


def test_scan_ignores_unfinished_folders_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_store(tmp_path)
    write_store(tmp_path, version="2").rename(tmp_path / "tiny" / ".2.tmp")
    write_store(tmp_path, name="other").parent.rename(tmp_path / ".other")
    (tmp_path / "tiny" / "3").mkdir()
    (tmp_path / "tiny" / "notes.txt").touch()
    assert list(scan(tmp_path)) == [("tiny", 1)]
    assert caplog.records == []


def test_scan_detects_a_changed_file(tmp_path: Path) -> None:
    folder = write_store(tmp_path)
    before = scan(tmp_path)
    assert scan(tmp_path) == before
    os.utime(folder / "golden.npz", ns=(1, 1))
    assert scan(tmp_path) != before
