"""Replica: the whole service in a Ray process. Requests come from Ray's HTTP proxies instead of a port."""

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
from deploy.ray.metrics import merge
from deploy.ray.middleware import ReplicaMiddleware

logger = logging.getLogger(__name__)

WATCHER_STOP_SECONDS = 0.5
GATHER_SECONDS = 2.0


class Replica:
    """Answers as `python -m app` does, with the settings of its environment. Ray calls the methods below by name."""

    def __init__(self) -> None:
        """Raises: SettingsError."""
        prepare_process()
        self._settings = read_settings()
        refuse_unsupported(self._settings)
        configure_logs(self._settings.log_level, self._settings.log_format)
        self._service = make_service(self._settings)
        self._context = serve.get_replica_context()
        self._watcher: Watcher | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Load and verify the store. Ray sends no requests before this returns.

        Raises: StartupError.
        """
        app = create_app(self._service)
        loop = asyncio.get_running_loop()
        self._watcher = await asyncio.to_thread(load, self._settings, self._service, loop)
        self._service.publish(self._watcher.catalogue)
        self._watcher.start()
        return ReplicaMiddleware(app, self._context.replica_id.unique_id, self._gather_metrics)

    def check_health(self) -> None:
        """Raises: EngineStalled, on which Ray replaces this replica."""
        self._service.require_alive()

    def read_metrics(self) -> tuple[str, bytes]:
        """Return this replica's name and its own exposition."""
        return self._context.replica_id.unique_id, generate_latest(self._service.metrics.registry)

    async def _gather_metrics(self) -> bytes:
        """Collect the metrics of all replicas, because a scrape cannot choose its replica."""
        handle = serve.get_deployment_handle(self._context.deployment, self._context.app_name)
        try:
            found = await handle.broadcast("read_metrics").results_async(
                timeout_s=GATHER_SECONDS, return_exceptions=True
            )
        except TimeoutError:
            logger.warning(
                "a replica did not return its metrics in time; this scrape has the metrics of one replica only"
            )
            found = [self.read_metrics()]
        return merge(dict(item for item in found if isinstance(item, tuple)))

    async def __del__(self) -> None:
        """Stop the watcher. Ray has already drained the requests and stopped the application."""
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.stop, WATCHER_STOP_SECONDS)


def refuse_unsupported(settings: Settings) -> None:
    """Raises: SettingsError for settings that a replica cannot honour and an operator would rely on."""
    if settings.tls_certificate is not None:
        raise SettingsError(
            f"DTEM_TLS_CERTIFICATE={settings.tls_certificate}: replicas do not listen;"
            " set ssl_certfile and ssl_keyfile in Ray's http_options"
        )
