"""Sends a file N times by urllib, which asks to close each connection; prints the status of each answer."""

import sys
import urllib.error
import urllib.request
from pathlib import Path

url, file, n = sys.argv[1:]
body = Path(file).read_bytes()
for _ in range(int(n)):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, method="POST")) as response:
            response.read()
            print(response.status)
    except urllib.error.HTTPError as error:
        error.read()
        print(error.code)
    except OSError as error:
        print(f"lost: {error!r}")
