"""A stub of dcgm-exporter for machines without a GPU: it returns the example of its documentation.

Needs only Python: `python dcgm_exporter.py` listens on port 9400.
"""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXPOSITION = Path(__file__).parent / "dcgm-exporter.txt"
PORT = 9400


class Recorded(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(EXPOSITION.read_bytes())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name in the base class)
        pass


@contextmanager
def run_dcgm_exporter() -> Iterator[int]:
    """Serve on a free port. Yields the port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorded)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("0.0.0.0", PORT), Recorded).serve_forever()
