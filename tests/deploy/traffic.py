"""Traffic of every kind: each variant, consent, deadlines that cannot be kept, mistakes, callers who leave."""

import http.client
import itertools
import json
import socket
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

    def leave(self, path: str, body: bytes) -> None:
        """Send a request and do not wait for the answer."""
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((self.host, self.port), TIMEOUT_SECONDS) as wire:
            wire.sendall(head.encode() + body)
            time.sleep(0.01)  # until it waits, or runs

    def models(self) -> list[dict[str, Any]]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_SECONDS)
        connection.request("GET", "/models")
        found: list[dict[str, Any]] = json.load(connection.getresponse())["models"]
        connection.close()
        return found


def send_all_kinds(address: Address, image: bytes, seconds: float, n_callers: int = 24) -> Counter[int]:
    """Send every kind of request, from callers who wait for their answers, for some seconds. Returns the statuses."""
    kinds = itertools.cycle(list_kinds(address, image))
    slow = encode(Image.new("RGB", (4000, 4000)), "PNG")  # takes longer to decode than its deadline
    until, statuses = time.monotonic() + seconds, Counter[int]()

    def call() -> None:
        while time.monotonic() < until:
            statuses[address.post(*next(kinds))] += 1

    def come_and_go() -> None:
        while time.monotonic() < until:
            address.leave("/classify", image)
            time.sleep(0.1)

    def be_late() -> None:
        while time.monotonic() < until:
            statuses[address.post("/classify?deadline_ms=50", slow)] += 1
            time.sleep(0.2)

    targets = [call] * n_callers + [come_and_go, be_late]
    callers = [threading.Thread(target=target) for target in targets]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return statuses


def list_kinds(address: Address, image: bytes) -> list[tuple[str, bytes, str]]:
    """List requests to every variant that is served, and every way to ask for one, well and badly."""
    variants = {(v["policy"], v["r"]) for model in address.models() for v in model["variants"]}
    paths = [f"policy={policy}" + ("" if r is None else f"&r={r}") for policy, r in sorted(variants, key=str)]
    paths += ["r=0&allow_degrade=true"] * (len(paths) // 3) + ["deadline_ms=1000", "deadline_ms=3"]
    paths += ["r=3", "policy=nothing", "model=nothing", "top_k=x"]
    kinds = [(f"/classify?{path}", image, "application/octet-stream") for path in paths]
    part = b'--X\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%b\r\n'
    form = b"".join(part % file for file in (image, b"no image", image, image)) + b"--X--\r\n"
    return [*kinds, ("/classify", b"no image", "image/png"), ("/classify", form, "multipart/form-data; boundary=X")]
