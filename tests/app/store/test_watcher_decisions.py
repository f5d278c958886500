import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import StoreError
from app.store.scan import Signature, Version, scan
from app.store.start import choose_default, sort_by_age
from app.store.watcher import compare, keep_last
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
    default = max(served)[0]
    kept = keep_last(served, gone, default)
    left = (served - gone) | ({kept} if kept else set())
    assert default in {name for name, _ in left}
    if kept:
        assert kept == max(version for version in served if version[0] == default)
        assert kept in gone


def test_choose_default_returns_the_configured_or_the_oldest_model(tmp_path: Path) -> None:
    assert choose_default(tmp_path, ["b", "a"], {}, "a") == "a"
    assert choose_default(tmp_path, ["b", "a"], {}, None) == "b"
    with pytest.raises(StoreError, match="DTEM_DEFAULT_MODEL=c: no such model; accepted: a, b"):
        choose_default(tmp_path, ["b", "a"], {}, "c")


def test_models_are_sorted_by_their_first_version(tmp_path: Path) -> None:
    created = {("new", 1): "2027-01-01", ("old", 9): "2028-01-01", ("old", 2): "2026-01-01", ("bad", 1): "yesterday"}
    for (name, number), date in created.items():
        folder = write_store(tmp_path, name, str(number))
        manifest = json.loads((folder / "manifest.json").read_bytes())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"created": f"{date}T12:00:00Z"}))
    assert sort_by_age(tmp_path, created) == ["old", "new", "bad"]


def test_a_copy_of_a_model_is_younger_than_its_original(tmp_path: Path) -> None:
    for name, written_at in (("b", 1), ("a", 2)):
        os.utime(write_store(tmp_path, name) / "manifest.json", (written_at, written_at))
    assert sort_by_age(tmp_path, [("a", 1), ("b", 1)]) == ["b", "a"]


def test_scan_lists_finished_versions_and_why_others_are_ignored(tmp_path: Path) -> None:
    write_store(tmp_path)
    write_store(tmp_path, version="2").rename(tmp_path / "tiny" / ".2.tmp")
    write_store(tmp_path, name="other").parent.rename(tmp_path / ".other")
    write_store(tmp_path, name="Upper")
    for name in ("3", "v4", "05", "latest"):
        (tmp_path / "tiny" / name).mkdir()
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "tiny" / "notes.txt").touch()
    found = scan(tmp_path)
    assert (list(found.versions), found.unreadable) == ([("tiny", 1)], set())
    assert sorted(found.ignored) == ["Upper", "tiny/05", "tiny/3", "tiny/latest", "tiny/v4"]
    assert found.ignored["tiny/3"] == "not finished: it has no manifest.json"
    assert found.ignored["tiny/v4"] == "not a version number; accepted: [1-9][0-9]{0,8}"


def test_scan_follows_links_and_survives_those_that_lead_nowhere(tmp_path: Path) -> None:
    folder = write_store(tmp_path)
    before = scan(tmp_path)
    (folder / "golden.npz").rename(tmp_path / "blob")
    (folder / "golden.npz").symlink_to(tmp_path / "blob")
    assert scan(tmp_path) == before
    os.utime(tmp_path / "blob", ns=(1, 1))
    assert scan(tmp_path) != before
    (tmp_path / "blob").unlink()
    assert list(scan(tmp_path).versions) == [("tiny", 1)]


def test_scan_detects_a_changed_file(tmp_path: Path) -> None:
    folder = write_store(tmp_path)
    before = scan(tmp_path)
    assert scan(tmp_path) == before
    os.utime(folder / "golden.npz", ns=(1, 1))
    assert scan(tmp_path) != before
