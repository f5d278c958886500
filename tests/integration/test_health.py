import http.client
import json
import socket
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.app.odd_images import encode, make_photo
from tests.app.store.test_loader import renew_digests
from tests.app.tiny_store import make_graph, write_store
from tests.integration.server import Server, wait_until

PNG = encode(make_photo(8, 8), "PNG")
WHITE = encode(Image.new("RGB", (8, 8), "white"), "PNG")
HEAD = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(WHITE)}\r\n\r\n".encode()
SECONDS = 60


def make_hanging_graph(r: int) -> onnx.ModelProto:
    """Make a graph that counts to 2 ** 40 for a white image, and runs normally for others."""
    model = make_graph(r)
    product = next(node for node in model.graph.node if node.output[0] == "product")
    product.output[0] = "before"
    describe = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Identity", ["now"], ["then"])],
        "body",
        [
            describe("i", TensorProto.INT64, []),
            describe("go", TensorProto.BOOL, []),
            describe("now", TensorProto.FLOAT, ["batch", 3]),
        ],
        [describe("go_on", TensorProto.BOOL, []), describe("then", TensorProto.FLOAT, ["batch", 3])],
    )
    nodes = [
        helper.make_node("ReduceMean", ["scaled"], ["brightness"], keepdims=0),
        helper.make_node("Floor", ["brightness"], ["is_white"]),
        helper.make_node("Cast", ["is_white"], ["once"], to=TensorProto.INT64),
        helper.make_node("Mul", ["once", "n_iterations"], ["times"]),
        helper.make_node("Loop", ["times", "", "before"], ["product"], body=body),
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**40, np.int64), "n_iterations"))
    place = list(model.graph.node).index(product) + 1
    rest = list(model.graph.node)[place:]
    del model.graph.node[place:]
    model.graph.node.extend([*nodes, *rest])
    return model


def test_hanging_batch_fails_the_probes_and_does_not_block_the_exit(tmp_path: Path) -> None:
    folder = write_store(tmp_path)
    (folder / "tome-r8.onnx").write_bytes(make_hanging_graph(8).SerializeToString())
    renew_digests(folder)
    with (
        Server(tmp_path, tmp_path / "log", stall_seconds=1, drain_seconds=2) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as hung,
    ):
        assert server.ask("POST", "/classify", PNG)[0] == 200
        assert server.ask("GET", "/health/live")[0] == 200
        hung.sendall(HEAD + WHITE)
        wait_until(lambda: server.ask("GET", "/health/live")[0] == 503)
        for method, path, body in (("GET", "/health/ready", None), ("POST", "/classify", PNG)):
            status, answer = server.ask(method, path, body)
            assert (status, json.loads(answer)["code"]) == (503, "engine_stalled")
        # The request in flight is answered, not left hanging.
        response = http.client.HTTPResponse(hung)
        response.begin()
        assert (response.status, json.loads(response.read())["code"]) == (503, "engine_stalled")
        started_at = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started_at < 10
