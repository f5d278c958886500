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
from app.store.loader import StoreOptions, load_catalogue, load_version
from app.store.preprocessing import limit_pillow
from app.store.watcher import Watcher
from app.system.memory import return_large_blocks

logger = logging.getLogger(__name__)


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
    graph_format = ENGINES[settings.engine].graph_format
    wanted = StoreOptions(graph_format, settings.precision, settings.default_model, settings.max_batch_images)
    catalogue = load_catalogue(settings.model_store, backend, wanted, service.metrics.count_reload)
    reason = "the only model" if settings.default_model is None else "DTEM_DEFAULT_MODEL"
    logger.info("the default model is %s: %s", catalogue.default_model, reason)
    return Watcher(
        settings,
        catalogue,
        # One thread: requests have priority.
        load=lambda folder: load_version(folder, backend, wanted, n_threads=1),
        publish=lambda catalogue: loop.call_soon_threadsafe(service.publish, catalogue),
        count=service.metrics.count_reload,
    )
