"""What Docker asks every few seconds: exit status 0 if the service in this container is ready.

A process of its own each time, so it imports little, and reads the few settings that it needs by itself.
"""

import http.client
import os
import ssl
import sys

TIMEOUT_SECONDS = 4
ANY = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def is_ready() -> bool:
    host, port = os.environ.get("DTEM_HOST", ""), int(os.environ.get("DTEM_PORT") or 8000)
    host = ANY.get(host, host)
    if os.environ.get("DTEM_TLS_CERTIFICATE"):
        context = ssl._create_unverified_context()  # it asks itself
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
