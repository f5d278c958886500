"""Two nodes with one replica each: failures, scaling and reloads under load lose no request."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from tests.app.odd_images import encode, make_photo
from tests.deploy.ray_server import RayServer
from tests.integration.load import Load
from tests.integration.server import wait_until

PNG = encode(make_photo(8, 8), "PNG")
# Slow to decode, so that requests are in replicas rather than on the way.
SLOW = encode(Image.new("RGB", (2000, 2000)), "PNG")
N_CLIENTS = 16
# Requests answered before an event.
N_BEFORE = 100
# After 1 second the proxy tries another replica, unless one has accepted the request.
HELD_SECONDS = 3.0


@pytest.fixture
def server(ray_server: RayServer) -> Iterator[RayServer]:
    wait_until(lambda: len(ray_server.series("dtem_ready")) == 2)
    yield ray_server
    assert "Traceback" not in ray_server.log


@pytest.fixture
def load(server: RayServer) -> Iterator[Load]:
    with Load(server.port, SLOW, n_clients=N_CLIENTS, is_kept=True) as load:
        wait_until(lambda: load.outcomes[200] >= N_BEFORE and len(served_by(load)) == 2)
        yield load


def served_by(load: Load) -> set[str]:
    return {name for name in load.servers.copy() if name and ";" not in name}


def count_retried(load: Load) -> int:
    return sum(n for name, n in load.servers.items() if "; attempt=" in name)


def freeze_with_requests_in_flight(load: Load, pid: int) -> None:
    """Stop a replica while it has requests: they stay unanswered while others are answered."""

    def is_holding() -> bool:
        os.kill(pid, signal.SIGSTOP)
        frozen_at, before = time.monotonic(), load.outcomes[200]
        wait_until(lambda: load.outcomes[200] >= before + N_BEFORE and time.monotonic() >= frozen_at + HELD_SECONDS)
        is_held = load.has_waited_since(frozen_at)
        if not is_held:
            os.kill(pid, signal.SIGCONT)
        return is_held

    wait_until(is_holding)


def kill(load: Load, what: str, end: Callable[[], object]) -> None:
    """Kill something, wait until a new replica serves, and count lost and retried requests."""
    before, started_at = served_by(load), time.monotonic()
    end()
    wait_until(lambda: bool(served_by(load) - before))
    seconds = time.monotonic() - started_at
    wait_until(lambda: not load.has_waited_since(started_at))
    lost = sum(n for outcome, n in load.outcomes.items() if outcome != 200)
    n_all, n_retried = load.outcomes.total(), count_retried(load)
    print(f"killed {what}: {n_all} requests, {lost} lost, {n_retried} retried, replaced after {seconds:.1f} s")
    assert set(load.outcomes) == {200}, load.outcomes
    assert n_retried > 0


def test_killed_node_loses_no_request_to_another_nodes_proxy(server: RayServer, load: Load) -> None:
    pid = next(pid for pid in server.replica_pids() if not server.is_on_head(pid))

    def end() -> None:
        server.tell("kill node")
        # Frozen, it would not notice.
        os.kill(pid, signal.SIGKILL)

    freeze_with_requests_in_flight(load, pid)
    kill(load, "a node", end)
    server.tell("add node")


def test_killed_replica_loses_no_request(server: RayServer, load: Load) -> None:
    pid = server.replica_pids()[0]
    freeze_with_requests_in_flight(load, pid)
    kill(load, "a replica", lambda: os.kill(pid, signal.SIGKILL))


def test_all_replicas_load_and_drop_versions_under_load(server: RayServer, load: Load) -> None:
    with server.published("tiny", "2"):
        wait_until(lambda: load.versions["2"] >= N_BEFORE)
    before = load.versions["2"]
    wait_until(lambda: load.versions["1"] >= 2 * N_BEFORE)
    # Requests in flight.
    assert load.versions["2"] - before <= N_CLIENTS
    assert set(load.outcomes) == {200}, load.outcomes


def test_replicas_scale_with_the_load(server: RayServer) -> None:
    quick = {"metrics_interval_s": 0.2, "look_back_period_s": 1, "upscale_delay_s": 0.2, "downscale_delay_s": 1}
    with Load(server.port, PNG, n_clients=1, is_kept=True) as single:
        server.deploy(1, 2, target_ongoing_requests=4, **quick)
        wait_until(lambda: len(server.replica_pids()) == 1)
        with Load(server.port, PNG, n_clients=N_CLIENTS, is_kept=True) as load:
            wait_until(lambda: len(served_by(load)) == 2)
        wait_until(lambda: len(server.replica_pids()) == 1)
        server.deploy()
    assert set(load.outcomes) | set(single.outcomes) == {200}, (load.outcomes, single.outcomes)
