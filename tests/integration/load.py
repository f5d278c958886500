"""Clients that post without a pause until the server is gone, and say what became of every request."""

import http.client
import json
import select
import socket
import threading
import time
from collections import Counter
from typing import Self

SECONDS = 60


class Load:
    """Threads with a connection each: kept as long as the server keeps it, or a new one for every request.

    `outcomes` counts statuses; `lost`: the request was sent whole, and the server went without a word; `unsent`: it
    could not be sent whole. A client ends when it can connect no more, or at the end of the block.
    """

    def __init__(
        self, port: int, body: bytes, n_clients: int, is_kept: bool, path: str = "/classify", host: str = "127.0.0.1"
    ) -> None:
        ends = b"" if is_kept else b"Connection: close\r\n"
        head = b"POST %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n" % (path.encode(), ends, len(body))
        self._address, self._request = (host, port), head + body
        self._is_over = threading.Event()
        self.outcomes: Counter[int | str] = Counter()
        self.versions: Counter[str] = Counter()
        self.servers: Counter[str] = Counter()  # what `X-Served-By` says, on a cluster
        self._sent_at: dict[int, float] = {}  # what waits for its answer, by client
        self._threads = [threading.Thread(target=self._post_on) for _ in range(n_clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()

    def has_waited_since(self, moment: float) -> bool:
        """Tell whether a request is unanswered that was sent before. Units: seconds of time.monotonic."""
        return any(sent_at < moment for sent_at in list(self._sent_at.values()))

    def _post_on(self) -> None:
        while not self._is_over.is_set():
            try:
                wire = socket.create_connection(self._address, timeout=SECONDS)
            except OSError:
                return
            with wire:
                while not self._is_over.is_set() and self._post(wire):
                    pass

    def _post(self, wire: socket.socket) -> bool:
        """Send a request and read its answer. Returns whether the connection can be used again."""
        if select.select([wire], [], [], 0)[0]:  # closed meanwhile: every pool of connections looks before it sends
            return False
        client = threading.get_ident()
        try:
            wire.sendall(self._request)
        except OSError:
            self.outcomes["unsent"] += 1
            return False
        self._sent_at[client] = time.monotonic()
        response = http.client.HTTPResponse(wire)
        try:
            response.begin()
            answer = response.read()
        except (OSError, http.client.HTTPException):
            self.outcomes["lost"] += 1
            return False
        finally:
            del self._sent_at[client]
        self.outcomes[response.status] += 1
        self.servers[response.headers.get("X-Served-By", "")] += 1
        if response.status == 200:
            self.versions[json.loads(answer)["model"]["version"]] += 1
        return not response.will_close
