"""Traffic of every kind: all variants, degradation, unmeetable deadlines, client errors, disconnects."""

import http.client
import itertools
import json
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tests.app.odd_images import encode

TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    def post(self, path: str, body: bytes, content_type: str = "application/octet-stream") -> int:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_SECONDS)
        try:
            connection.request("POST", path, body, {"Content-Type": content_type})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()

    def disconnect(self, path: str, body: bytes) -> None:
        """Send a request and reset the connection before the answer.

        A connection that is only closed may be half-closed: the service finds out when the answer is there already.
        """
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((self.host, self.port), TIMEOUT_SECONDS) as wire:
            wire.sendall(head.encode() + body)
            # Until the image is queued or running.
            time.sleep(0.01)
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def models(self) -> list[dict[str, Any]]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_SECONDS)
        connection.request("GET", "/models")
        found: list[dict[str, Any]] = json.load(connection.getresponse())["models"]
        connection.close()
        return found


def send_all_kinds(address: Address, image: bytes, seconds: float, n_clients: int = 24) -> Counter[int]:
    """Send every kind of request for some seconds, from clients that wait for each answer. Returns the statuses."""
    kinds = itertools.cycle(list_kinds(address, image))
    # Takes longer to decode than its deadline.
    slow = encode(Image.new("RGB", (4000, 4000)), "PNG")
    until, statuses = time.monotonic() + seconds, Counter[int]()

    def send_and_wait() -> None:
        while time.monotonic() < until:
            statuses[address.post(*next(kinds))] += 1

    def send_and_disconnect() -> None:
        while time.monotonic() < until:
            address.disconnect("/classify", image)
            time.sleep(0.1)

    def miss_deadlines() -> None:
        while time.monotonic() < until:
            statuses[address.post("/classify?deadline_ms=50", slow)] += 1
            time.sleep(0.2)

    targets = [send_and_wait] * n_clients + [send_and_disconnect, miss_deadlines]
    clients = [threading.Thread(target=target) for target in targets]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return statuses


def list_kinds(address: Address, image: bytes) -> list[tuple[str, bytes, str]]:
    """List valid requests for every variant served, and every kind of invalid request."""
    variants = {(v["policy"], v["r"]) for model in address.models() for v in model["variants"]}
    paths = [f"policy={policy}" + ("" if r is None else f"&r={r}") for policy, r in sorted(variants, key=str)]
    paths += ["r=0&allow_degrade=true"] * (len(paths) // 3) + ["deadline_ms=1000", "deadline_ms=3"]
    paths += ["r=3", "policy=nothing", "model=nothing", "top_k=x"]
    kinds = [(f"/classify?{path}", image, "application/octet-stream") for path in paths]
    part = b'--X\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%b\r\n'
    form = b"".join(part % file for file in (image, b"no image", image, image)) + b"--X--\r\n"
    return [*kinds, ("/classify", b"no image", "image/png"), ("/classify", form, "multipart/form-data; boundary=X")]
