"""run.json: what ran in the folder of a run, on which machine, from when to when."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from training.learn.run_folder import replaced
from training.provenance import git_commit, package_version

FILE = "run.json"
_PACKAGES = ("dtem-serve", "torchvision", "timm", "numpy", "pillow")


@contextmanager
def recorded_session(folder: Path, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Add a session to run.json: one for the start of a run, and one for each time it resumed.

    Yields the session, for what is known at its end. Without `end`, it was killed.
    """
    file = folder / FILE
    sessions = json.loads(file.read_text())["sessions"] if file.exists() else []
    session = {"start": _now(), **_surroundings(), **facts}

    def write() -> None:
        with replaced(file) as new:
            new.write_text(json.dumps({"sessions": [*sessions, session]}, indent=2, ensure_ascii=False))

    write()
    session["outcome"] = "ended"
    try:
        yield session
    except BaseException as err:
        session["outcome"] = " ".join(f"{type(err).__name__}: {err}".split())
        raise
    finally:
        session["end"] = _now()
        # The disk may be full, which is then being reported.
        with suppress(OSError):
            write()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _surroundings() -> dict[str, Any]:
    return {
        "command": shlex.join(sys.orig_argv),
        "git_commit": git_commit(marks_changes=True),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: package_version(name) for name in _PACKAGES},
        },
        "host": platform.node(),
        "host_cpu": _cpu(),
        "n_cpus": len(os.sched_getaffinity(0)),
        "n_threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
