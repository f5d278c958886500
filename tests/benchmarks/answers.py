"""Made-up results of calls to the service."""

import asyncio
import json
from typing import Any

from benchmarks.load.open_loop import CallResult


def make_result(status: int, latency_ms: float | None = None, document: dict[str, Any] | None = None) -> CallResult:
    """Return the result of a call sent 1 s after the zero of the clock."""
    with asyncio.Runner() as runner:
        ended = runner.get_loop().create_future()
    answered_at = None if latency_ms is None else 1 + latency_ms / 1e3
    return CallResult(1.0, ended, 1.0, answered_at, status, b"", json.dumps(document or {}).encode())


def classified(policy: str, r: int | None, version: str = "4", **more: Any) -> dict[str, Any]:
    model = {"name": "reference", "version": version}
    return {"predictions": [{"index": 3}], "model": model, "policy": policy, "r": r, "degraded": False, **more}
