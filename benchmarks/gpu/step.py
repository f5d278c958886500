"""One step of the report in a process of its own: its rows go to a file, a line as each is measured.

A step that is killed at its limit, or by the system, so leaves what it had measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from app.backends import ENGINES
from benchmarks.gpu.size import SIZES

# Imported when chosen: a package that one step lacks must not cost the others.
STEPS = {
    "machine": "benchmarks.gpu.machine",
    "tests": "benchmarks.gpu.gpu_tests",
    "offline": "benchmarks.gpu.offline",
    "store": "benchmarks.gpu.store",
    "service": "benchmarks.gpu.service",
    "training": "benchmarks.gpu.training_step",
}
MAX_CHARACTERS = 1000


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed; the last row then has the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--model", default="", help="one of the size's models, for steps that are of one")
    parser.add_argument("--engine", choices=ENGINES, required=True, help="of the service")
    parser.add_argument("--work", type=Path, required=True, help="folder that the steps share")
    parser.add_argument("--rows", type=Path, required=True, help="file for the rows, one JSON object a line")
    options = parser.parse_args(arguments)
    with options.rows.open("a", encoding="utf-8") as out:
        try:
            module = importlib.import_module(STEPS[options.step])
            size = replace(SIZES[options.size], engine=options.engine)
            for row in module.rows(size, options.model, options.work):
                print(json.dumps(row, allow_nan=False), file=out, flush=True)
        except Exception as error:  # noqa: BLE001  # whatever it is, the report says so and the next step runs
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"[:MAX_CHARACTERS]
            print(json.dumps({"kind": "error", "reason": reason}), file=out)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
