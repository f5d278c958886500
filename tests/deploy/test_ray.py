"""Two nodes with a replica each: what dies, grows or changes under load costs nobody an answer."""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.app.odd_images import encode, make_photo
from tests.deploy.ray_server import RayServer
from tests.integration.load import Load
from tests.integration.test_start_and_stop import wait_until

PNG = encode(make_photo(8, 8), "PNG")
N_CLIENTS = 16
N_BEFORE = 100  # requests answered before something happens


@pytest.fixture
def server(ray_server: RayServer) -> Iterator[RayServer]:
    wait_until(lambda: len(ray_server.series("dtem_ready")) == 2)
    yield ray_server
    assert "Traceback" not in ray_server.log


@pytest.fixture
def load(server: RayServer) -> Iterator[Load]:
    with Load(server.port, PNG, n_clients=N_CLIENTS, is_kept=True) as load:
        wait_until(lambda: load.outcomes[200] >= N_BEFORE and len(served_by(load)) == 2)
        yield load


def served_by(load: Load) -> set[str]:
    return {name for name in load.servers.copy() if ";" not in name}


def count_resent(load: Load) -> int:
    return sum(n for name, n in load.servers.items() if "; attempt=" in name)


def kill_while_busy(server: RayServer, load: Load) -> None:
    """Kill a replica so that requests die in it, and wait until another one in its place has served."""
    before = served_by(load)
    os.kill(server.replica_pids()[0], signal.SIGKILL)
    wait_until(lambda: bool(served_by(load) - before))


def test_a_killed_replica_loses_no_request(server: RayServer, load: Load) -> None:
    kill_while_busy(server, load)
    assert set(load.outcomes) == {200}, load.outcomes
    assert count_resent(load) > 0
