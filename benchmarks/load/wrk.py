"""wrk, a compiled HTTP client. It uses little CPU time, which matters on cores shared with the server."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import MeasurementError

LINE = "result "
SCRIPT = """\
-- Posts the files one after another, from requests built once, and prints the result at the end.
local files = {%(files)s}
local requests = {}
local current = 0

function init(args)
  for place, name in ipairs(files) do
    local file = assert(io.open(name, "rb"))
    requests[place] = wrk.format("POST", nil, {["Content-Type"] = "image/jpeg"}, file:read("*a"))
    file:close()
  end
end

function request()
  current = current %% #requests + 1
  return requests[current]
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '%(line)s{"n_requests": %%d, "seconds": %%.6f, "p50_ms": %%.3f, "p99_ms": %%.3f, "errors": ' ..
    '{"connect": %%d, "read": %%d, "write": %%d, "status": %%d, "timeout": %%d}}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
"""


@dataclass(frozen=True)
class Saturation:
    """Completed requests, all with status 200. client_cpu_seconds: of wrk."""

    n_requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    client_cpu_seconds: float

    @property
    def per_second(self) -> float:
        return self.n_requests / self.seconds


def find_wrk() -> str:
    """Raises: MeasurementError if wrk is not installed."""
    path = shutil.which("wrk")
    if path is None:
        raise MeasurementError("wrk is not installed; on Debian and Ubuntu: apt-get install wrk")
    return path


def write_script(file: Path, images: Sequence[Path]) -> Path:
    """Write the Lua script that makes wrk post these images."""
    names = ", ".join(json.dumps(str(image.resolve())) for image in images)
    file.write_text(SCRIPT % {"files": names, "line": LINE}, encoding="utf-8")
    return file


def saturate(wrk: str, script: Path, url: str, n_connections: int, seconds: int) -> Saturation:
    """Keep connections busy for some seconds.

    Raises: MeasurementError if any request failed.
    """
    command = [wrk, "--threads", "1", "--connections", str(n_connections), "--duration", f"{seconds}s"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, "--timeout", "30s", "--script", str(script), url], capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise MeasurementError(f"wrk ended with status {done.returncode}: {(done.stderr or done.stdout).strip()}")
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return read_result(done.stdout, url, cpu_seconds)


def read_result(output: str, url: str, client_cpu_seconds: float) -> Saturation:
    """Raises: MeasurementError if the output has no result, or failed requests."""
    lines = [line.removeprefix(LINE) for line in output.splitlines() if line.startswith(LINE)]
    if not lines:
        raise MeasurementError(f"wrk printed no result for {url}: {output.strip()}")
    found: dict[str, Any] = json.loads(lines[0])
    errors = {name: count for name, count in found.pop("errors").items() if count}
    if errors or not found["n_requests"]:
        reason = errors or "none was answered"
        raise MeasurementError(f"{url}: failures among {found['n_requests']} requests: {reason}")
    return Saturation(**found, client_cpu_seconds=client_cpu_seconds)
