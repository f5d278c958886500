import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.errors import ServiceError, status_and_code
from app.store.manifest import Manifest
from app.store.preprocessing import decode_image
from benchmarks.load.labelled_jpegs import LabelledJpeg
from benchmarks.load.open_loop import LOST, Call, ClientLoad
from benchmarks.soak.__main__ import main
from benchmarks.soak.ledger import Account
from benchmarks.soak.measure import Store
from benchmarks.soak.report import draw_figure, summarise, tables
from benchmarks.soak.requests import Mixture, Request, make_form, make_infer_request, make_png
from benchmarks.soak.violations import Limits, Observations, find_violations, memory_windows
from tests.app.odd_images import encode, make_photo
from tests.app.tiny_store import make_manifest, write_store
from tests.benchmarks.answers import classified, make_result

JPEGS = [LabelledJpeg(encode(make_photo(112, 112, seed), "JPEG", quality=95), seed) for seed in (1, 2, 3)]
LIMITS = Limits(max_refused=0.1, max_growth_bytes=10e6)
CALL = Call(b"POST /classify?r=8 HTTP/1.1\r\n\r\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, Any]:
    return make_manifest(folder, ("onnx",))


@pytest.fixture(scope="module")
def drawn(manifest: dict[str, Any]) -> list[Request]:
    return Mixture(manifest, JPEGS, 10_000, 0).draw(3000)


def body_of(request: Request) -> bytes:
    return request.call.data.partition(b"\r\n\r\n")[2]


def test_a_seed_draws_the_same_requests(manifest: dict[str, Any], drawn: list[Request]) -> None:
    again = Mixture(manifest, JPEGS, 10_000, 0).draw(3000)
    assert [one.call for one in again] == [one.call for one in drawn]
    assert [one.call for one in Mixture(manifest, JPEGS, 10_000, 1).draw(3000)] != [one.call for one in drawn]


def test_the_mixture_covers_every_promise_and_refusal(drawn: list[Request]) -> None:
    kinds = Counter(one.kind for one in drawn)
    assert len(kinds) == 21
    assert {status for one in drawn for status in one.statuses} == {LOST, 200, 400, 404, 413, 415, 422, 429, 504}
    for name in (
        b"r=16",
        b"max_gmacs=",
        b"min_accuracy=",
        b"deadline_ms=",
        b"allow_degrade=true",
        b"max_r=",
        b"policy=atm",
    ):
        assert any(name in one.call.data.partition(b"\r\n")[0] for one in drawn), name


def test_content_lengths_match_and_clients_disconnect_during_or_after_the_body(drawn: list[Request]) -> None:
    for one in drawn:
        head, _, body = one.call.data.partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
        hang_up_after = one.call.hang_up_after
        if one.kind == "client disconnects during the body":
            assert hang_up_after is not None
            assert len(head) < hang_up_after < len(one.call.data)
        elif one.kind == "client disconnects after the body":
            assert hang_up_after == len(one.call.data)
        else:
            assert hang_up_after is None


def test_invalid_images_are_refused_with_an_allowed_status(manifest: dict[str, Any], drawn: list[Request]) -> None:
    rule = Manifest.model_validate_json(json.dumps(manifest)).input
    for kind in ("broken image", "not an image", "too many pixels"):
        for request in [one for one in drawn if one.kind == kind][:20]:
            with pytest.raises(ServiceError) as refused:
                decode_image(body_of(request), rule, 50_000_000)
            assert status_and_code(refused.value)[0] in request.statuses


def test_answers_are_checked_against_their_requests(manifest: dict[str, Any]) -> None:
    mixture = Mixture(manifest, JPEGS, 10_000, 0)
    by_kind = {one.kind: one for one in mixture.draw(500)}
    expensive = classified("tome", 0, gmacs=99.0, accuracy={"top1": 0.1})
    assert not by_kind["max_gmacs"].keeps_promise(expensive)
    assert by_kind["max_gmacs"].keeps_promise({**expensive, "gmacs": 0.01})
    assert not by_kind["min_accuracy"].keeps_promise(expensive)
    assert by_kind["min_accuracy"].keeps_promise({**expensive, "accuracy": {"top1": 1.0}})
    assert by_kind["default"].keeps_promise(classified("tome", 8))
    assert not by_kind["default"].keeps_promise(classified("tome", 16))
    assert by_kind["adaptive policy"].keeps_promise(classified("atm", None))
    for kind in ("allow_degrade", "max_r"):
        assert not by_kind[kind].keeps_promise(classified("tome", 1000))
    broken = [{"status": 400}, classified("tome", 8)]
    assert not by_kind["form with a broken file"].keeps_promise({"results": broken})
    assert by_kind["form with a broken file"].keeps_promise({"results": [broken[1], broken[1], broken[0]]})
    assert not by_kind["v2"].keeps_promise({"parameters": {"policy": "tome", "r": 1000}})


def test_a_degraded_answer_must_say_so(manifest: dict[str, Any]) -> None:
    only_zero = {**manifest, "variants": [one for one in manifest["variants"] if one["policy"] == "tome"]}
    asked = [one for one in Mixture(only_zero, JPEGS, 10_000, 0).draw(300) if one.kind == "allow_degrade"]
    one = next(one for one in asked if b"r=8" in one.call.data)
    assert one.keeps_promise(classified("tome", 8))
    assert one.keeps_promise({**classified("tome", 16), "degraded": True})
    assert not one.keeps_promise(classified("tome", 16))
    assert not one.keeps_promise({**classified("tome", 0), "degraded": True})


def test_bodies_are_valid_forms_tensors_and_images() -> None:
    assert make_form([b"one", b"two"]).count(b'name="file"') == 2
    head, _, body = make_infer_request("m", b"12345", {"r": 8}).partition(b"\r\n\r\n")
    length = int(head.partition(b"Inference-Header-Content-Length: ")[2].partition(b"\r\n")[0])
    assert json.loads(body[:length])["parameters"] == {"r": 8}
    assert body[length:] == b"\x05\x00\x00\x0012345"
    assert Image.open(io.BytesIO(make_png(30, 20))).size == (30, 20)


def observations(**changes: Any) -> Observations:
    memory = [(float(second), 100_000_000) for second in range(9)]
    reloads = [("5", 2.0, 0.5), ("6", 4.0, 0.5)]
    return Observations(**{"memory": memory, "reloads": reloads, "last_versions": ["6"], **changes})


def seen(status: int = 200, keeps: bool = True) -> list[str]:
    """Return the violations of three valid answers and one with this status."""
    requests = [Request("r", CALL, frozenset({200, 429}), lambda answer: keeps)] * 4
    results = [make_result(200, 5, classified("tome", 8, version)) for version in ("4", "5", "6")]
    results.append(make_result(status, 5, classified("tome", 8)))
    counted = Counter([*[Account("tome", "8", 200)] * 3, Account("tome", "8", status)])
    return find_violations(requests, results, observations(), counted, LIMITS)


def test_valid_answers_are_no_violation() -> None:
    assert seen() == []


def test_every_violation_is_found() -> None:
    assert any("r: 500, expected 200, 429: POST /classify?r=8" in one for one in seen(500))
    assert any("without a deadline were refused" in one for one in seen(429))
    assert any("the answer does not match the request" in one for one in seen(keeps=False))
    grown = observations(memory=[(float(second), 100_000_000 + second * 3_000_000) for second in range(9)])
    assert any("memory grew from" in one for one in find_violations([], [], grown, Counter(), LIMITS))
    for changes, message in (
        ({"reloads": [("5", 2.0, 0.5)]}, "1 of 2 new versions were served"),
        ({"last_versions": ["5", "6"]}, "are listed at the end"),
        ({}, "version 6 was published and listed, but answered no request"),
    ):
        assert message in "; ".join(find_violations([], [], observations(**changes), Counter(), LIMITS))


def test_memory_is_compared_by_minutes_or_quarters() -> None:
    assert memory_windows([(float(second), second) for second in range(0, 301)]) == (30, 270)
    assert memory_windows([(float(second), second) for second in range(0, 41)]) == (5, 35)


def test_the_report_shows_kinds_memory_and_violations() -> None:
    requests = [Request("r", CALL, frozenset({200})), Request("left", CALL, frozenset({LOST}))]
    results = [make_result(200, 5, classified("tome", 8)), make_result(LOST)]
    about = {"model": "m", "minutes": 1.0, "load": 0.8, "capacity": 50.0, "setting": []}
    content = {"about": about, "violations": ["it broke"]}
    content |= summarise(requests, results, observations(), ClientLoad(0.1, 2.0))
    table = tables(content)
    assert "| r | 200: 1 | 5.0 | 5.0 |" in table
    assert "| left | no response: 1 |  |  |" in table
    assert "5 (served after 0.5 s)" in table
    assert "**Violations: 1.**" in table
    assert "- it broke" in table
    json.dumps(content)
    assert len(draw_figure(content).axes) == 2


def test_a_version_is_published_and_the_old_one_removed(folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path, folder)
    old = store.publish_next()
    assert (old.name, store.folder.name) == ("1", "2")
    store.remove(old)
    assert [path.name for path in old.parent.iterdir()] == ["2"]
    assert json.loads((store.folder / "manifest.json").read_text())["version"] == "2"


@pytest.mark.parametrize("option", ["--minutes", "--load", "--warm-up-seconds"])
def test_numbers_that_are_not_positive_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([option, "0"])
    assert f"argument {option}: 0: expected a number above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_nothing_fails_under_mixed_traffic_and_two_reloads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--minutes", "0.2", "--load", "0.3", "--warm-up-seconds", "1", "--n-images", "10"]
    out = tmp_path / "soak"
    assert main(["--published", str(folder), *short, "--out", str(out)]) == 0, capsys.readouterr()
    content = json.loads(out.with_suffix(".json").read_text())
    assert content["violations"] == []
    assert set(content["versions"]) == {"1", "2", "3"}
    assert out.with_suffix(".png").stat().st_size > 10_000
