"""Bootstrap: start-up steps shared by `python -m app` and other servers."""

import asyncio
import logging
import os

from prometheus_client import CollectorRegistry, disable_created_metrics

from app.backends import ENGINES, BackendOptions, open_backend
from app.errors import BackendError, SettingsError
from app.observability.metrics import Metrics
from app.serving.service import Service
from app.settings import Settings
from app.store.catalogue import Catalogue
from app.store.footprint import MemoryRule
from app.store.loader import StoreOptions, load_version
from app.store.preprocessing import limit_pillow
from app.store.start import load_catalogue
from app.store.watcher import Watcher
from app.system.memory import free_bytes, return_large_blocks

logger = logging.getLogger(__name__)

# While a version is loaded, a run may take longer than when it is served: the first one is slow, and so is a busy CPU.
STALLS_PER_RUN = 6


def prepare_process() -> None:
    """Set process-wide options. Call this before importing an engine."""
    # ONNX Runtime sends telemetry from its import on.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return_large_blocks()
    # Omits the `_created` series of each counter.
    disable_created_metrics()  # type: ignore[no-untyped-call]


def make_service(settings: Settings) -> Service:
    """Make a service; it is not ready until a catalogue is published."""
    limit_pillow(settings.max_pixels)
    return Service(settings, Metrics(CollectorRegistry()))


def load(settings: Settings, service: Service, loop: asyncio.AbstractEventLoop) -> Watcher:
    """Open the engine and load the store.

    Returns: a watcher with the loaded catalogue, which publishes later ones to the service in the event loop.

    Raises: StartupError.
    """
    options = BackendOptions(settings.device, settings.n_inference_threads, settings.share_weights)
    try:
        backend = open_backend(settings.engine, options)
    except BackendError as error:
        raise SettingsError(f"DTEM_ENGINE={settings.engine} DTEM_DEVICE={settings.device}: {error}") from error
    wanted = StoreOptions(
        ENGINES[settings.engine].graph_format,
        settings.precision,
        settings.default_model,
        settings.max_batch_images,
        make_memory_rule(settings),
        STALLS_PER_RUN * settings.stall_seconds,
    )
    catalogue = load_catalogue(settings.model_store, backend, wanted, service.metrics.count_reload)
    _log_default(catalogue, settings.default_model)
    return Watcher(
        settings,
        catalogue,
        # One thread: requests have priority.
        load=lambda folder: load_version(folder, backend, wanted, n_threads=1),
        publish=lambda catalogue: loop.call_soon_threadsafe(service.publish, catalogue),
        count=service.metrics.count_reload,
    )


def _log_default(catalogue: Catalogue, configured: str | None) -> None:
    if configured is None and len(catalogue.models) > 1:
        logger.warning("the default model is %s, the oldest; set DTEM_DEFAULT_MODEL", catalogue.default_model)
        return
    reason = "the only model" if configured is None else "DTEM_DEFAULT_MODEL"
    logger.info("the default model is %s: %s", catalogue.default_model, reason)


def make_memory_rule(settings: Settings) -> MemoryRule | None:
    """Return None for a GPU: its memory is not the container's, and its engine refuses what does not fit."""
    if settings.device != "cpu":
        return None
    return MemoryRule(settings.max_batch_images, settings.share_weights, free_bytes)
