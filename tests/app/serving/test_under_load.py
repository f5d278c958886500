"""Concurrent requests with different options, queued behind a device that blocks until it is opened."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from app.backends import Outputs, Pixels
from app.errors import BackendError
from app.observability.record import RequestRecord
from app.serving.pending import Decoded
from app.store.catalogue import Catalogue, ServedModel, ServedVariant
from app.store.costs import CostTable
from app.store.manifest import VariantKey
from app.store.selection import Query, select
from tests.app.api.test_classify import PNG, SECONDS, assert_problem
from tests.app.api.test_models import sample
from tests.app.conftest import ClientFactory
from tests.app.odd_images import encode, make_photo
from tests.app.simulation import make_served
from tests.integration.server import wait_until

WHITE = encode(make_photo(8, 8).point(lambda value: 255), "PNG")


class Device:
    """Blocks until it is opened. Fails for white images."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        # Rate and number of images.
        self.batches: list[tuple[int | None, int]] = []
        self.n_started = 0

    def runner(self, r: int | None) -> Any:
        device = self

        class Runner:
            def run(self, pixels: Pixels) -> Outputs:
                device.n_started += 1
                assert device.opened.wait(SECONDS)
                device.batches.append((r, len(pixels)))
                if (pixels.reshape(len(pixels), -1).min(axis=1) == 255).any():
                    raise BackendError("white")
                return {"logits": np.zeros((len(pixels), 3), np.float32)}

        return Runner()


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.opened.set()


@pytest.fixture
def served(catalogue: Catalogue, device: Device) -> Catalogue:
    """Policy tome at rates 0, 8 and 16, each 10 ms per image faster and less accurate than the last."""
    variants: dict[VariantKey, ServedVariant] = {}
    for r in (0, 8, 16):
        costs = CostTable({n: n * (0.030 - r / 800) for n in (1, 2, 4, 8)})
        spec = make_served(r, {1: 1.0}, top1=0.9 - r / 100).spec
        variants[spec.key] = ServedVariant(spec, device.runner(r), costs=costs)
    return Catalogue({"tiny": {1: ServedModel(catalogue.find(None, None).manifest, variants)}}, "tiny")


Post = Callable[..., "Future[Any]"]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


@pytest.fixture
def client(make_client: ClientFactory, served: Catalogue) -> TestClient:
    return make_client(served, max_concurrent_batches=1)


@pytest.fixture
def post(client: TestClient, pool: ThreadPoolExecutor) -> Post:
    def post(query: str = "", image: bytes = PNG) -> "Future[Any]":
        return pool.submit(client.post, f"/classify?{query}", content=image)

    return post


def n_in_flight(client: TestClient) -> float:
    return sample(client, "dtem_in_flight_images")


def n_queued(client: TestClient, r: int) -> float:
    return sample(client, f'dtem_queue_depth_images{{model="tiny",policy="tome",r="{r}"}}')


def fill(client: TestClient, post: Post, device: Device, queries: list[str], image: bytes = PNG) -> list["Future[Any]"]:
    """Start one request, and queue the others behind it."""
    first = post("r=0")
    wait_until(lambda: device.n_started == 1)
    others = [post(query, image) for query in queries]
    wait_until(lambda: sum(n_queued(client, r) for r in (0, 8, 16)) == len(queries))
    return [first, *others]


def test_requests_for_one_variant_share_a_batch(client: TestClient, post: Post, device: Device) -> None:
    answers = fill(client, post, device, ["r=0", "r=16", "r=0", "r=16", "r=0"])
    assert n_queued(client, 0) == 3
    device.opened.set()
    assert [answer.result(SECONDS).json()["batch_size"] for answer in answers] == [1, 3, 2, 3, 2, 3]
    assert [answer.result(SECONDS).json()["r"] for answer in answers] == [0, 0, 16, 0, 16, 0]
    assert sorted(device.batches[1:], key=str) == [(0, 3), (16, 2)]
    assert sample(client, 'dtem_batch_images_sum{model="tiny",policy="tome",r="0"}') == 4
    assert sample(client, 'dtem_batch_images_count{model="tiny",policy="tome",r="0"}') == 2


def test_only_the_faulty_image_of_a_batch_fails(client: TestClient, post: Post, device: Device) -> None:
    answers = fill(client, post, device, ["r=0"] * 3)
    answers.append(post("r=0", WHITE))
    wait_until(lambda: n_queued(client, 0) == 4)
    device.opened.set()
    assert [answer.result(SECONDS).status_code for answer in answers] == [200, 200, 200, 200, 500]
    assert_problem(answers[-1].result(SECONDS), 500, "inference_failed")


def test_only_opted_in_requests_are_degraded_under_load(client: TestClient, post: Post, device: Device) -> None:
    opted_in = ["r=0&allow_degrade=true"] * 8 + ["r=0&max_r=8"] * 2
    _, *answers = fill(client, post, device, [*opted_in, "r=0", "r=8"])
    device.opened.set()
    found = [(answer.result(SECONDS).json()["r"], answer.result(SECONDS).json()["degraded"]) for answer in answers]
    assert found == [(16, True)] * 8 + [(8, True)] * 2 + [(0, False), (8, False)]
    assert sample(client, 'dtem_degraded_total{model="tiny",policy="tome",r="16"}') == 8
    assert sample(client, 'dtem_degraded_total{model="tiny",policy="tome",r="8"}') == 2
    assert sample(client, 'dtem_requests_total{code="200",model="tiny",policy="tome",r="16"}') == 8


def test_no_request_is_degraded_on_an_idle_device(client: TestClient, device: Device) -> None:
    device.opened.set()
    for query in ("allow_degrade=true&r=0", "max_r=16&r=0", "deadline_ms=5000"):
        answer = client.post(f"/classify?{query}", content=PNG).json()
        assert answer["degraded"] is False


def test_passed_deadline_gets_504_at_once(client: TestClient, post: Post, device: Device) -> None:
    started_at = time.monotonic()
    late = post("deadline_ms=300")
    wait_until(lambda: device.n_started == 1)
    assert_problem(late.result(SECONDS), 504, "deadline_passed")
    # Without waiting for the run, which continues.
    assert 0.25 < time.monotonic() - started_at < 5
    assert sample(client, 'dtem_deadline_misses_total{reason="deadline_passed"}') == 1
    assert sample(client, 'dtem_cancelled_total{reason="running"}') == 1
    assert n_in_flight(client) == 0


def test_unmeetable_deadline_is_refused_before_decoding(client: TestClient, post: Post, device: Device) -> None:
    response = client.post("/classify?deadline_ms=1", content=PNG)
    assert_problem(response, 429, "deadline_unmeetable")
    assert int(response.headers["retry-after"]) >= 1
    # 30 ms each.
    answers = fill(client, post, device, ["deadline_ms=5000&max_r=0"] * 20)
    response = client.post("/classify?deadline_ms=6000&max_r=0", content=b"not even an image")
    # Admitted, since the deadline can be met.
    assert_problem(response, 415, "not_an_image")
    response = client.post("/classify?deadline_ms=100&max_r=0", content=b"not even an image")
    assert_problem(response, 429, "deadline_unmeetable")
    device.opened.set()
    assert {answer.result(SECONDS).status_code for answer in answers} == {200}
    assert sample(client, 'dtem_deadline_misses_total{reason="deadline_unmeetable"}') == 2


def test_deadline_selects_a_cheaper_variant_if_time_is_short(client: TestClient, post: Post, device: Device) -> None:
    device.opened.set()
    for deadline_ms, r in ((60_000, 0), (25, 8), (15, 16)):
        query = Query(deadline_ms=str(deadline_ms))
        service = client.service  # type: ignore[attr-defined]
        chosen = select(service.require_ready(), query)
        pixels, deadline = np.zeros((8, 8, 3), np.uint8), service.engine.clock() + deadline_ms / 1e3
        entry = service._make_entry(chosen, Decoded(pixels, 0.0, 0.0), deadline, "", None)
        assert entry.ladder[0].spec.r == r


def test_cancelled_request_leaves_the_queue_and_never_runs(client: TestClient, post: Post, device: Device) -> None:
    first = post("r=0")
    wait_until(lambda: device.n_started == 1)
    service = client.service  # type: ignore[attr-defined]
    chosen = select(service.require_ready(), Query(r="16"))
    assert client.portal is not None
    cancelled = client.portal.start_task_soon(service.infer, chosen, [PNG, PNG], RequestRecord())
    wait_until(lambda: n_queued(client, 16) == 2)
    cancelled.cancel()
    wait_until(lambda: n_queued(client, 16) == 0)
    wait_until(lambda: n_in_flight(client) == 1)
    assert sample(client, 'dtem_cancelled_total{reason="waiting"}') == 2
    device.opened.set()
    assert first.result(SECONDS).status_code == 200
    assert device.batches == [(0, 1)]


def test_full_queue_refuses_only_requests_for_its_variant(
    make_client: ClientFactory, served: Catalogue, device: Device, pool: ThreadPoolExecutor
) -> None:
    client = make_client(served, max_concurrent_batches=1, max_queue_images=2, max_files=2)

    def post(query: str, image: bytes = PNG) -> "Future[Any]":
        return pool.submit(client.post, f"/classify?{query}", content=image)

    answers = fill(client, post, device, ["r=0", "r=0"])
    refused = client.post("/classify?r=0", content=PNG)
    assert_problem(refused, 429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    other = post("r=16")
    wait_until(lambda: n_queued(client, 16) == 1)
    device.opened.set()
    assert {answer.result(SECONDS).status_code for answer in (*answers, other)} == {200}
    assert sample(client, 'dtem_refusals_total{reason="queue_full"}') == 1
