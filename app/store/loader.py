"""Loader: verify, load and warm up one model version."""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from app.backends import Backend, InterruptibleRunner, Outputs, Pixels, Runner
from app.errors import BackendError, StoreError
from app.store.catalogue import ServedModel, ServedVariant
from app.store.costs import CostTable, batch_buckets
from app.store.files import read_manifest_file, verify_files
from app.store.footprint import MemoryRule, require_memory
from app.store.manifest import MANIFEST_FILE, Manifest, Variant, VariantKey
from app.store.outputs import GMACS, TASKS, TOKENS, GraphOutput, list_outputs

logger = logging.getLogger(__name__)

N_LOADING_THREADS = 4
GMACS_RTOL = 1e-5
# Unpacked. A few images take some MB; a small archive can unpack to any size.
MAX_GOLDEN_BYTES = 256_000_000


@dataclass(frozen=True)
class StoreOptions:
    """Which variants to serve, and up to which batch size.

    memory: None to load a version whatever it needs. max_run_seconds: of a batch, while it is verified and timed.
    """

    graph_format: str
    precision: str
    default_model: str | None
    max_batch_images: int = 1
    memory: MemoryRule | None = None
    max_run_seconds: float = 60.0


def load_version(
    folder: Path, backend: Backend, options: StoreOptions, n_threads: int = N_LOADING_THREADS
) -> ServedModel:
    """Load one version: manifest, digests, graphs, golden outputs, warm-up.

    Raises: StoreError.
    """
    manifest = read_manifest(folder)
    require_task(folder, manifest)
    specs = choose_variants(folder, manifest, options)
    if options.memory is not None:
        require_memory(folder, manifest, specs, options.memory)
    verify_files(folder, manifest, n_threads)
    outputs = {spec.key: list_outputs(manifest, spec) for spec in specs}
    golden = read_golden(folder, manifest, outputs)
    runners = load_runners(folder, manifest, {spec.file: outputs[spec.key] for spec in specs}, backend, n_threads)
    found = {
        name: run(folder / name, runner, golden.pixels, options.max_run_seconds) for name, runner in runners.items()
    }
    for spec in specs:
        compare_golden(folder, spec, outputs[spec.key], found[spec.file], golden, manifest.golden.atol)
    unmerged_gmacs = max(spec.gmacs for spec in specs)
    variants = {}
    for spec in specs:
        costs = measure(folder / spec.file, runners[spec.file], golden.pixels, options)
        variants[spec.key] = ServedVariant(spec, runners[spec.file], costs=costs, unmerged_gmacs=unmerged_gmacs)
        variants[spec.key].latency.add(costs.seconds(1))
    logger.info("loaded %s version %s: %d variants", manifest.name, manifest.version, len(variants))
    return ServedModel(manifest, variants)


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(read_manifest_file(folder))
    except ValidationError as error:
        raise StoreError(path, _describe(error)) from error
    if (manifest.name, manifest.version) != (folder.parent.name, folder.name):
        raise StoreError(
            path, f"declares {manifest.name}/{manifest.version}, but its folder is {folder.parent.name}/{folder.name}"
        )
    return manifest


def require_task(folder: Path, manifest: Manifest) -> None:
    """Raises: StoreError for a task that the service does not know."""
    if manifest.task not in TASKS:
        reason = f"task: {manifest.task!r} is not served; accepted: {', '.join(TASKS)}"
        raise StoreError(folder / MANIFEST_FILE, reason)


def choose_variants(folder: Path, manifest: Manifest, options: StoreOptions) -> list[Variant]:
    """Return the variants of the configured precision and format.

    Raises: StoreError if they do not include the model's default.
    """
    wanted = (options.precision, options.graph_format)
    specs = [variant for variant in manifest.variants if (variant.precision, variant.format) == wanted]
    default = (manifest.default.policy, manifest.default.r)
    if default not in [(spec.policy, spec.r) for spec in specs]:
        available = sorted({f"{variant.precision} {variant.format}" for variant in manifest.variants})
        reason = (
            f"the default variant (policy {default[0]}, r {default[1]}) is not exported as {' '.join(wanted)};"
            f" available: {', '.join(available)}"
        )
        raise StoreError(folder / MANIFEST_FILE, reason)
    return specs


@dataclass(frozen=True)
class Golden:
    """Images with their expected outputs. Shapes: pixels (n, H, W, 3)."""

    pixels: Pixels
    outputs: Mapping[VariantKey, Outputs]


def read_golden(folder: Path, manifest: Manifest, outputs: Mapping[VariantKey, Sequence[GraphOutput]]) -> Golden:
    """Read the golden images, and the golden outputs of these variants.

    Raises: StoreError.
    """
    path = folder / manifest.golden.file
    try:
        with np.load(path, allow_pickle=False) as archive:
            _require_small(path, sum(member.file_size for member in archive.zip.infolist()))
            pixels = np.asarray(archive["pixels"])
            found = {
                key: {output.role: np.asarray(archive[f"{output.role}/{key}"]) for output in of_variant}
                for key, of_variant in outputs.items()
            }
    except StoreError:
        raise
    except KeyError as error:
        raise StoreError(path, f"missing array: {error.args[0]}") from error
    except Exception as error:
        # zipfile, zlib and numpy each raise their own types.
        raise StoreError(path, f"cannot be read: {error}") from error
    shape = (manifest.input.height, manifest.input.width, 3)
    _require_array(path, "pixels", pixels, np.uint8, (max(1, len(pixels)) if pixels.ndim else 1, *shape))
    for key, of_variant in outputs.items():
        _require_outputs(path, f"/{key}", found[key], of_variant, len(pixels))
    return Golden(pixels, found)


def _require_small(path: Path, n_bytes: int) -> None:
    if n_bytes > MAX_GOLDEN_BYTES:
        raise StoreError(path, f"unpacks to {n_bytes} bytes; accepted: at most {MAX_GOLDEN_BYTES}")


def _require_outputs(path: Path, suffix: str, found: Outputs, expected: Sequence[GraphOutput], n_images: int) -> None:
    for output in expected:
        name = f"{output.role}{suffix}"
        _require_array(path, name, found[output.role], output.dtype, (n_images, *output.shape))


def _require_array(path: Path, name: str, array: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        wanted = f"{np.dtype(dtype)} {shape}"
        raise StoreError(path, f"{name} is {array.dtype} {array.shape}, expected {wanted}")


def load_runners(
    folder: Path,
    manifest: Manifest,
    outputs: Mapping[str, Sequence[GraphOutput]],
    backend: Backend,
    n_threads: int,
) -> dict[str, Runner]:
    """Load each graph file once, even if several variants share it.

    outputs: by file name.
    Raises: StoreError.
    """

    def load(name: str) -> Runner:
        try:
            names = {output.role: output.name for output in outputs[name]}
            return backend.load(folder / name, manifest.input.name, names)
        except BackendError as error:
            raise StoreError(folder / name, str(error)) from error

    files = sorted(outputs)
    with ThreadPoolExecutor(n_threads) as pool:
        return dict(zip(files, pool.map(load, files), strict=True))


def run(path: Path, runner: Runner, pixels: Pixels, max_seconds: float) -> Outputs:
    """Raises: StoreError."""
    try:
        if isinstance(runner, InterruptibleRunner):
            return runner.run_within(pixels, max_seconds)
        return runner.run(pixels)
    except BackendError as error:
        raise StoreError(path, str(error)) from error


def compare_golden(
    folder: Path, spec: Variant, outputs: Sequence[GraphOutput], found: Outputs, golden: Golden, atol: float
) -> None:
    """Compare a variant's outputs on this host with those of the export.

    The task's output must match within the tolerance, token counts exactly, and GMACs up to rounding.
    Raises: StoreError.
    """
    path, expected = folder / spec.file, golden.outputs[spec.key]
    _require_outputs(path, "", found, outputs, len(golden.pixels))
    role = outputs[0].role
    difference = float(np.max(np.abs(found[role].astype(np.float64) - expected[role])))
    # Written so that NaN fails too.
    if not difference <= atol:
        reason = f"{spec.id}: golden {role} differ by {difference:.3g}, tolerance {atol:.3g}"
        raise StoreError(path, reason)
    if TOKENS in expected and not np.array_equal(found[TOKENS], expected[TOKENS]):
        raise StoreError(path, f"{spec.id}: golden token counts differ from the export")
    if GMACS in expected and not np.allclose(found[GMACS], expected[GMACS], rtol=GMACS_RTOL):
        raise StoreError(path, f"{spec.id}: golden GMACs differ from the export")


def measure(path: Path, runner: Runner, pixels: Pixels, options: StoreOptions) -> CostTable:
    """Warm up a variant, and time it at batch 1 and at the largest batch; interpolate linearly between them.

    Raises: StoreError.
    """
    seconds = {}
    for size in sorted({1, options.max_batch_images}):
        batch = np.resize(pixels, (size, *pixels.shape[1:]))
        started_at = time.perf_counter()
        run(path, runner, batch, options.max_run_seconds)
        seconds[size] = time.perf_counter() - started_at
    return CostTable(CostTable(seconds).by_size(batch_buckets(options.max_batch_images)))


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}{more}".removeprefix(": ")
