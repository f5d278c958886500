"""A stand-in for dcgm-exporter, as there is no GPU here: it answers what its documentation shows.

Needs nothing but Python: `python dcgm_exporter.py` serves it on port 9400 in a container.
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

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name in the base class)
        pass


@contextmanager
def run_dcgm_exporter() -> Iterator[int]:
    """Serve it on a port that is yielded."""
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
