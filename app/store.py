"""Store: find, verify, load and warm up the model versions in a folder. Nothing unverified leaves this module."""

import hashlib
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from app.backends import Answer, Backend, Pixels, Runner
from app.catalogue import Catalogue, LatencyLog, ServedModel, ServedVariant
from app.errors import BackendError, StoreError
from app.manifest import MANIFEST_FILE, Manifest, Variant
from app.serving.costs import CostTable, batch_buckets

logger = logging.getLogger(__name__)

VERSION_FOLDER = re.compile(r"[1-9][0-9]{0,8}")
N_LOADING_THREADS = 4
GMACS_RTOL = 1e-5


@dataclass(frozen=True)
class StoreOptions:
    """Which of the variants to serve."""

    format: str
    precision: str
    default_model: str | None
    max_batch_images: int = 1


def load_catalogue(folder: Path, backend: Backend, options: StoreOptions) -> Catalogue:
    """Load every version of every model.

    Raises: StoreError naming the first file that fails, and why.
    """
    models: dict[str, dict[int, ServedModel]] = {}
    for version_folder in find_versions(folder):
        model = load_version(version_folder, backend, options)
        models.setdefault(model.manifest.name, {})[int(model.manifest.version)] = model
    if not models:
        raise StoreError(folder, f"no model in it (no <model>/<version>/{MANIFEST_FILE})")
    default_model = options.default_model or min(models)
    if default_model not in models:
        raise StoreError(folder, f"DTEM_DEFAULT_MODEL={default_model} is not in it, only {', '.join(sorted(models))}")
    return Catalogue(models, default_model)


def find_versions(folder: Path) -> list[Path]:
    """List the finished version folders. Unfinished and temporary ones are left out, with a log line."""
    if not folder.is_dir():
        raise StoreError(folder, "is not a folder")
    finished = []
    for version_folder in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        if VERSION_FOLDER.fullmatch(version_folder.name) and (version_folder / MANIFEST_FILE).exists():
            finished.append(version_folder)
        else:
            logger.warning("ignored %s: not a version, or without %s (unfinished)", version_folder, MANIFEST_FILE)
    return finished


def load_version(folder: Path, backend: Backend, options: StoreOptions) -> ServedModel:
    """Load one version: manifest, digests, graphs, golden outputs, warm-up.

    Raises: StoreError.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    entries = choose_variants(folder, manifest, options)
    golden = read_golden(folder, manifest, entries)
    runners = load_runners(folder, manifest, entries, backend)
    answers = {name: run(folder / name, runner, golden.pixels) for name, runner in runners.items()}
    for entry in entries:
        compare_golden(folder, entry, answers[entry.file], golden, manifest.golden.atol)
    variants = {
        (entry.policy, entry.r): measure(folder, entry, runners[entry.file], golden.pixels, options.max_batch_images)
        for entry in entries
    }
    logger.info("loaded %s version %s: %d variants", manifest.name, manifest.version, len(variants))
    return ServedModel(manifest, variants)


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StoreError(path, error.strerror or str(error)) from error
    except ValidationError as error:
        raise StoreError(path, _describe(error)) from error
    if (manifest.name, manifest.version) != (folder.parent.name, folder.name):
        raise StoreError(
            path, f"says {manifest.name}/{manifest.version}, but lies in {folder.parent.name}/{folder.name}"
        )
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Check that the folder holds the files of the manifest, byte for byte, and no others."""
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MANIFEST_FILE}
    unlisted = sorted(present - set(manifest.files))
    if unlisted:
        raise StoreError(folder / unlisted[0], f"is not listed in {MANIFEST_FILE}")
    with ThreadPoolExecutor(N_LOADING_THREADS) as pool:
        list(pool.map(lambda name: _verify_file(folder, name, manifest), sorted(manifest.files)))


def _verify_file(folder: Path, name: str, manifest: Manifest) -> None:
    path, expected = folder / name, manifest.files[name]
    if path.resolve().parent != folder.resolve():
        raise StoreError(path, "leads out of its folder")
    try:
        with path.open("rb") as file:
            n_bytes = path.stat().st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(path, error.strerror or str(error)) from error
    if n_bytes != expected.bytes:
        raise StoreError(path, f"has {n_bytes} bytes instead of {expected.bytes}")
    if digest != expected.sha256:
        raise StoreError(path, f"SHA-256 is {digest} instead of {expected.sha256}")


def choose_variants(folder: Path, manifest: Manifest, options: StoreOptions) -> list[Variant]:
    """Pick the variants of the configured format and precision; the default must be among them."""
    wanted = (options.precision, options.format)
    entries = [variant for variant in manifest.variants if (variant.precision, variant.format) == wanted]
    default = (manifest.default.policy, manifest.default.r)
    if default not in [(entry.policy, entry.r) for entry in entries]:
        reason = f"the default (policy {default[0]}, r {default[1]}) is not there as {' '.join(wanted)}"
        raise StoreError(folder / MANIFEST_FILE, reason)
    return entries


@dataclass(frozen=True)
class Golden:
    """Inputs whose outputs are known. Shapes: pixels (n, H, W, 3)."""

    pixels: Pixels
    answers: dict[tuple[str, int | None], Answer]


def read_golden(folder: Path, manifest: Manifest, entries: list[Variant]) -> Golden:
    path = folder / manifest.golden.file
    try:
        with np.load(path, allow_pickle=False) as archive:
            pixels = np.asarray(archive["pixels"])
            found = {
                (entry.policy, entry.r): Answer(
                    *(np.asarray(archive[f"{name}/{_key(entry)}"]) for name in _outputs(entry))
                )
                for entry in entries
            }
    except KeyError as error:
        raise StoreError(path, f"lacks an array: {error.args[0]}") from error
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise StoreError(path, f"cannot be read: {error}") from error
    shape = (manifest.input.height, manifest.input.width, 3)
    _require_array(path, "pixels", pixels, np.uint8, (max(1, len(pixels)) if pixels.ndim else 1, *shape))
    for entry in entries:
        _require_answer(
            path, f"/{_key(entry)}", found[entry.policy, entry.r], entry, (len(pixels), len(manifest.labels))
        )
    return Golden(pixels, found)


def _key(entry: Variant) -> str:
    return entry.policy if entry.r is None else f"{entry.policy}-r{entry.r}"


def _outputs(entry: Variant) -> tuple[str, ...]:
    """Name the fields of `Answer` that a graph gives, in their order."""
    return ("logits", "tokens", "gmacs") if entry.data_dependent else ("logits",)


def _require_answer(path: Path, suffix: str, answer: Answer, entry: Variant, shape: tuple[int, int]) -> None:
    """Check types and shapes. Shapes: shape (n, classes)"""
    _require_array(path, f"logits{suffix}", answer.logits, np.float32, shape)
    if answer.tokens is not None:
        _require_array(path, f"tokens{suffix}", answer.tokens, np.int64, (shape[0], len(entry.tokens)))
    if answer.gmacs is not None:
        _require_array(path, f"gmacs{suffix}", answer.gmacs, np.float32, shape[:1])


def _require_array(path: Path, name: str, array: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        wanted = f"{np.dtype(dtype)} {shape}"
        raise StoreError(path, f"{name} is {array.dtype} {array.shape} instead of {wanted}")


def load_runners(folder: Path, manifest: Manifest, entries: list[Variant], backend: Backend) -> dict[str, Runner]:
    """Load each graph file once, whatever number of variants share it."""

    def load(name: str) -> Runner:
        try:
            return backend.load(folder / name, manifest.input.name, outputs[name])
        except BackendError as error:
            raise StoreError(folder / name, str(error)) from error

    given = manifest.output
    outputs = {
        entry.file: [name for name in (given.name, given.tokens, given.gmacs) if name is not None][
            : len(_outputs(entry))
        ]
        for entry in entries
    }
    names = sorted(outputs)
    with ThreadPoolExecutor(N_LOADING_THREADS) as pool:
        return dict(zip(names, pool.map(load, names), strict=True))


def run(path: Path, runner: Runner, pixels: Pixels) -> Answer:
    try:
        return runner.run(pixels)
    except BackendError as error:
        raise StoreError(path, str(error)) from error


def compare_golden(folder: Path, entry: Variant, answer: Answer, golden: Golden, atol: float) -> None:
    """Prove that this host computes what was exported: logits within the tolerance, tokens exactly."""
    path, expected = folder / entry.file, golden.answers[entry.policy, entry.r]
    _require_answer(path, "", answer, entry, (expected.logits.shape[0], expected.logits.shape[1]))
    difference = float(np.max(np.abs(answer.logits.astype(np.float64) - expected.logits)))
    if not difference <= atol:  # so that NaN fails too
        reason = f"{entry.id}: logits of the golden inputs differ by {difference:.3g}, tolerance {atol:.3g}"
        raise StoreError(path, reason)
    if expected.tokens is not None and not np.array_equal(answer.tokens, expected.tokens):  # type: ignore[arg-type]
        raise StoreError(path, f"{entry.id}: the golden inputs keep other tokens than when it was exported")
    if expected.gmacs is not None and not np.allclose(answer.gmacs, expected.gmacs, rtol=GMACS_RTOL):  # type: ignore[arg-type]
        raise StoreError(path, f"{entry.id}: the golden inputs cost other GMACs than when it was exported")


def measure(folder: Path, entry: Variant, runner: Runner, pixels: Pixels, max_batch_images: int) -> ServedVariant:
    """Warm a variant up and time it, for the latency of `/models` and the engine's plans before the first request.

    One image and the largest batch: the sizes between lie close to the line through both.
    """
    seconds = {}
    for size in sorted({1, max_batch_images}):
        batch = np.resize(pixels, (size, *pixels.shape[1:]))
        started_at = time.perf_counter()
        run(folder / entry.file, runner, batch)
        seconds[size] = time.perf_counter() - started_at
    buckets = batch_buckets(max_batch_images)
    variant = ServedVariant(entry, runner, LatencyLog(), CostTable(CostTable(seconds).by_size(buckets)))
    variant.latency.add(seconds[1])
    return variant


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}{more}".removeprefix(": ")
