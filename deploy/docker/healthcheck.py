"""Docker's health check: exits with 0 if the service in this container is ready.

Runs as a new process every few seconds, so it imports little and reads its few settings itself.
"""

import http.client
import os
import ssl
import sys

TIMEOUT_SECONDS = 4
# Addresses to listen on, and the addresses to reach them.
LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def is_ready() -> bool:
    host, port = os.environ.get("DTEM_HOST", ""), int(os.environ.get("DTEM_PORT") or 8000)
    host = LOOPBACK.get(host, host)
    if os.environ.get("DTEM_TLS_CERTIFICATE"):
        # The connection stays in the container, and the certificate names the public host.
        context = ssl._create_unverified_context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=TIMEOUT_SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(0 if is_ready() else 1)
