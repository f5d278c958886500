import json
import subprocess
import sys

FLOOD = """
import ctypes, os, sys, time
from app.observability.logs import configure_logs
from app.observability.stderr import divert_stderr
divert_stderr()
configure_logs("info", "json")
print("printed by Python", file=sys.stderr)
libc = ctypes.CDLL(None)
for index in range(200_000):
    libc.dprintf(2, b"line %d of a library, with something that makes it longer\\n", index)
print("printed to stdout")
time.sleep(0.2)
"""
MAX_BYTES = 3000


def test_what_a_library_prints_becomes_a_bounded_number_of_records() -> None:
    done = subprocess.run([sys.executable, "-c", FLOOD], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "printed to stdout\n"
    python, record = done.stderr.splitlines()
    assert python == "printed by Python"
    assert len(record) < MAX_BYTES
    fields = json.loads(record)
    assert (fields["level"], fields["message"]) == ("WARNING", "a library printed to stderr")
    assert fields["text"].startswith("line 0 of a library, with something that makes it longer\nline 1 of")
    assert fields["n_bytes"] > len(fields["text"])
