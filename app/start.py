"""Start: what a process does before its first request, whoever listens: `python -m app`, or a server around it."""

import asyncio
import os

from prometheus_client import CollectorRegistry, disable_created_metrics

from app.backends import BackendOptions, open_backend
from app.errors import BackendError, SettingsError
from app.images import limit_pillow
from app.memory import return_large_blocks
from app.metrics import Metrics
from app.reload import Reloader
from app.serving.service import Service
from app.settings import Settings
from app.store import StoreOptions, load_catalogue, load_version


def prepare_process() -> None:
    """Choose what holds for the whole process, before an engine is imported or memory is taken."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else ONNX Runtime reports to its maker as soon as imported
    return_large_blocks()
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every counter, which nobody reads


def make_service(settings: Settings) -> Service:
    """Make the service, which is not ready before a catalogue is published to it."""
    limit_pillow(settings.max_pixels)
    return Service(settings, Metrics(CollectorRegistry()))


def load(settings: Settings, service: Service, loop: asyncio.AbstractEventLoop) -> Reloader:
    """Open the engine and load the store; the reloader has what was loaded, and publishes to the loop.

    Raises: StartupError.
    """
    options = BackendOptions(settings.device, settings.n_inference_threads, settings.share_weights)
    try:
        backend = open_backend(settings.format, options)
    except BackendError as error:
        raise SettingsError(f"DTEM_FORMAT={settings.format} DTEM_DEVICE={settings.device}: {error}") from error
    wanted = StoreOptions(settings.format, settings.precision, settings.default_model, settings.max_batch_images)
    return Reloader(
        settings,
        service.metrics,
        load_catalogue(settings.model_store, backend, wanted),
        load=lambda folder: load_version(folder, backend, wanted, n_threads=1),  # requests come first
        publish=lambda catalogue: loop.call_soon_threadsafe(service.publish, catalogue),
    )
