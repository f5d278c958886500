"""Download the wheels that a bare GPU machine lacks: `python -m benchmarks.gpu.kit`, or `make gpu-kit`.

Such a machine has Python 3.12, PyTorch, ONNX and the usual scientific packages, and no package registry. It lacks the
service's dependencies and a few of the exporter's. Their wheels go to a folder that git ignores, at the versions of
constraints.txt, with the commit that they belong to: a copy of the working tree has no history to ask.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.commit import COMMIT_FILE, KIT, read_git_commit
from deploy.local.process import ROOT

SERVICE = (
    *("annotated-doc", "annotated-types", "anyio", "click", "fastapi", "h11", "httptools", "idna"),
    *("msgspec", "opentelemetry-api", "pillow", "prometheus_client", "pydantic", "pydantic_core"),
    *("python-multipart", "starlette", "typing-inspection", "typing_extensions", "uvicorn", "uvloop"),
)
EXPORTER = (
    *("attrs", "joblib", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py"),
    *("scikit-learn", "threadpoolctl", "timm"),
)
TESTS = ("httpcore2", "httpx2", "truststore")
PYTHON = "3.12"
GLIBC = ("2_39", "2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17")
MAX_BYTES = 50_000_000


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 downloaded, 1 where a wheel is missing or the kit is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, default=KIT, help="folder for the wheels; its old wheels are deleted")
    options = parser.parse_args(arguments)
    options.kit.mkdir(parents=True, exist_ok=True)
    for old in options.kit.glob("*.whl"):
        old.unlink()
    pins = read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    if subprocess.run(download_command(pins, options.kit), check=False).returncode:
        return 1
    (options.kit / COMMIT_FILE).write_text(read_git_commit() + "\n", encoding="ascii")
    n_bytes = sum(file.stat().st_size for file in options.kit.iterdir())
    print(f"{options.kit}: {len(list(options.kit.glob('*.whl')))} wheels, {n_bytes / 1e6:.0f} MB")
    if n_bytes > MAX_BYTES:
        print(f"more than the {MAX_BYTES / 1e6:.0f} MB that travel well", file=sys.stderr)
    return int(n_bytes > MAX_BYTES)


def read_pins(constraints: str) -> dict[str, str]:
    """Return the version of each package."""
    return dict(line.split("==") for line in constraints.splitlines() if "==" in line)


def download_command(pins: dict[str, str], folder: Path) -> list[str]:
    """Raises: KeyError for a package that constraints.txt does not pin."""
    platforms = [f"manylinux_{version}_x86_64" for version in GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"),
        *(part for platform in platforms for part in ("--platform", platform)),
        *("--dest", str(folder)),
        *(f"{name}=={pins[name]}" for name in (*SERVICE, *EXPORTER, *TESTS)),
    ]


if __name__ == "__main__":
    sys.exit(main())
