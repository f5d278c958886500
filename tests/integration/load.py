"""Clients that send requests without a pause until the server stops, and count the outcomes."""

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
    """Client threads with one connection each, either kept alive or new for every request.

    `outcomes` counts statuses, and requests without a response: `lost` if they were sent in full,
    else `unsent`. A client ends when it can no longer connect, or at the end of the block.
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
        # By `X-Served-By`, on a cluster.
        self.servers: Counter[str] = Counter()
        # Requests in flight, by client.
        self._sent_at: dict[int, float] = {}
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
        """Tell whether a request sent before this moment is still in flight. Units: s of time.monotonic."""
        return any(sent_at < moment for sent_at in list(self._sent_at.values()))

    def _post_on(self) -> None:
        while not self._is_over.is_set():
            try:
                connection = socket.create_connection(self._address, timeout=SECONDS)
            except OSError:
                return
            with connection:
                while not self._is_over.is_set() and self._post(connection):
                    pass

    def _post(self, connection: socket.socket) -> bool:
        """Send a request and read the response. Returns whether the connection can be reused."""
        # Like a connection pool, check first whether the server has closed the connection.
        if select.select([connection], [], [], 0)[0]:
            return False
        client = threading.get_ident()
        try:
            connection.sendall(self._request)
        except OSError:
            self.outcomes["unsent"] += 1
            return False
        self._sent_at[client] = time.monotonic()
        response = http.client.HTTPResponse(connection)
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
