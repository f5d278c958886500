"""Replica: a process of Ray's with the whole service in it, but for the port: requests come from Ray's HTTP proxies."""

import asyncio
import logging

from prometheus_client import generate_latest
from ray import serve
from starlette.types import ASGIApp

from app.bootstrap import load, make_service, prepare_process
from app.errors import SettingsError
from app.main import create_app
from app.observability.logs import configure_logs
from app.settings import Settings, read_settings
from app.store.watcher import Watcher
from deploy.ray.inlet import Inlet
from deploy.ray.metrics import merge

logger = logging.getLogger(__name__)

WATCHER_STOP_SECONDS = 0.5
GATHER_SECONDS = 2.0


class Replica:
    """Answers as `python -m app` does, by the settings in its own environment; Ray calls it by the names below."""

    def __init__(self) -> None:
        """Raises: SettingsError."""
        prepare_process()
        self._settings = read_settings()
        refuse_meaningless(self._settings)
        configure_logs(self._settings.log_level, self._settings.log_format)
        self._service = make_service(self._settings)
        self._context = serve.get_replica_context()
        self._watcher: Watcher | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Load and verify the store; before that is done, no request comes.

        Raises: StartupError.
        """
        app = create_app(self._service)
        loop = asyncio.get_running_loop()
        self._watcher = await asyncio.to_thread(load, self._settings, self._service, loop)
        self._service.publish(self._watcher.catalogue)
        self._watcher.start()
        return Inlet(app, self._context.replica_id.unique_id, self._gather_metrics)

    def check_health(self) -> None:
        """Raises: EngineStalled; Ray then replaces this replica."""
        self._service.require_alive()

    def read_metrics(self) -> tuple[str, bytes]:
        """Return which replica this is, and what it alone would show at `/metrics`."""
        return self._context.replica_id.unique_id, generate_latest(self._service.metrics.registry)

    async def _gather_metrics(self) -> bytes:
        """Ask all replicas: behind the proxies, nobody can choose which of them a scrape meets."""
        handle = serve.get_deployment_handle(self._context.deployment, self._context.app_name)
        try:
            found = await handle.broadcast("read_metrics").results_async(
                timeout_s=GATHER_SECONDS, return_exceptions=True
            )
        except TimeoutError:
            logger.warning("a replica did not show its metrics in time; this scrape has one replica's alone")
            found = [self.read_metrics()]
        return merge(dict(item for item in found if isinstance(item, tuple)))

    async def __del__(self) -> None:
        """Ray has waited for the requests inside, and stopped the application."""
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.stop, WATCHER_STOP_SECONDS)


def refuse_meaningless(settings: Settings) -> None:
    """Raises: SettingsError for what a replica cannot do, and an operator would rely on."""
    if settings.tls_certificate is not None:
        raise SettingsError("DTEM_TLS_CERTIFICATE: Ray's proxies listen; give it to them, as ssl_certfile")
