"""`python -m app`: read the settings, listen, load and verify the model store, and announce readiness."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
from pathlib import Path
from types import FrameType
from typing import cast

import uvicorn
import uvloop

from app.api.headers import server_headers
from app.api.http1.connections import Connections
from app.api.http1.timeouts import read_timeouts
from app.api.shutdown import ABORT_SECONDS, Server
from app.api.tls import open_tls
from app.bootstrap import load, make_service, prepare_process
from app.errors import SettingsError, StartupError
from app.main import create_app
from app.observability.logs import configure_logs
from app.observability.stderr import divert_stderr
from app.serving.service import Service
from app.settings import Settings, read_settings
from app.store.catalogue import Catalogue
from app.system.descriptors import allow_descriptors

logger = logging.getLogger(__name__)

EXAMPLES = Path(__file__).parents[1] / "examples"
BACKLOG = 2048
WATCHER_STOP_SECONDS = 0.5
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    """Run until a signal. Returns the exit status: 0 after a signal, 1 if the service could not start."""
    for number in STOP_SIGNALS:
        signal.signal(number, _exit)
    # Ignored until there is a store to rescan.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    prepare_process()
    try:
        settings = read_settings()
        divert_stderr()
        configure_logs(settings.log_level, settings.log_format)
        with listen(settings.host, settings.port) as listener:
            uvloop.run(serve(settings, listener))
    except StartupError as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 1
    return 0


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def listen(host: str, port: int) -> socket.socket:
    """Bind the port before loading, so that a port in use fails fast.

    Raises: SettingsError.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise SettingsError(f"DTEM_HOST={host} DTEM_PORT={port}: {error.strerror or error}") from error
    return listener


async def serve(settings: Settings, listener: socket.socket) -> None:
    """Serve while the store is loading, not ready until it is loaded. Then rescan it periodically and at SIGHUP.

    Raises: StartupError if the store cannot be loaded.
    """
    service = make_service(settings)
    server = Server(configure(settings, service, open_tls(settings)), service)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    loading = asyncio.create_task(asyncio.to_thread(load, settings, service, asyncio.get_running_loop()))
    await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        # Stopped while loading, which cannot be interrupted. Nothing is in flight.
        serving.result()
        os._exit(0)
    if server.should_exit:
        # A signal arrived while loading.
        return await serving
    try:
        watcher = loading.result()
    except BaseException:
        server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        raise
    service.publish(watcher.catalogue)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, watcher.scan_soon)
    watcher.start()
    print(announce(watcher.catalogue, listener, settings), flush=True)
    await serving
    if not watcher.stop(WATCHER_STOP_SECONDS) or not service.engine.has_ended():
        # A thread in library code cannot be interrupted. Nothing is in flight.
        os._exit(0)


def configure(settings: Settings, service: Service, tls: ssl.SSLContext | None) -> uvicorn.Config:
    """Configure uvicorn, with every choice it would otherwise derive from the installed packages."""
    return uvicorn.Config(
        create_app(service),
        http=cast(type[asyncio.Protocol], make_connections(settings, service)),
        loop="none",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        headers=server_headers(is_tls=tls is not None),
        ssl_context_factory=None if tls is None else lambda config, make_default: tls,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        # `Server` has already drained.
        timeout_graceful_shutdown=ABORT_SECONDS,
    )


def make_connections(settings: Settings, service: Service) -> Connections:
    max_connections = allow_descriptors(settings.max_connections)
    if max_connections < settings.max_connections:
        logger.warning(
            "DTEM_MAX_CONNECTIONS is %d, but the limit of open files allows %d: raise it (ulimit -n)",
            settings.max_connections,
            max_connections,
        )
    return Connections(read_timeouts(settings), max_connections, service.metrics.count_refusal)


def announce(catalogue: Catalogue, listener: socket.socket, settings: Settings) -> str:
    """Describe where the service listens, with an example request."""
    scheme = "http" if settings.tls_certificate is None else "https"
    has_keys = settings.api_keys is not None or settings.api_key_file is not None
    curl = 'curl -H "X-API-Key: $KEY"' if has_keys else "curl"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    images = sorted(path for path in EXAMPLES.glob("*") if path.suffix in (".jpg", ".jpeg", ".png"))
    image = images[0] if images else Path("image.jpg")
    if image.is_relative_to(Path.cwd()):
        image = image.relative_to(Path.cwd())
    r = catalogue.find(None, None).manifest.default.r
    return "\n".join(
        [
            f"ready: {address}",
            f"  try      {curl} --data-binary @{image} '{address}/classify?r={r}'",
            f"  docs     {address}/docs",
            f"  models   {address}/models",
            f"  metrics  {address}/metrics",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
