"""Main: makes the application, routes and middleware, around a service. Nothing is built at import."""

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from pydantic import BaseModel

from app import __version__
from app.api import classify, docs, health, models
from app.api.body_limit import BodyLimit
from app.api.boundary import Boundary, translate_framework_errors
from app.api.inference import inference_paths
from app.api.keys import Keys, is_open, read_keys
from app.api.schemas import Problem
from app.api.shutdown import CloseConnections
from app.api.v2 import routes as v2
from app.api.v2.messages import InferRequest, RequestInput, RequestOutput
from app.errors import SettingsError
from app.serving.service import Service
from app.settings import Settings

if TYPE_CHECKING:
    from app.observability.tracing import Tracing

TITLE = "dtem-serve"
DESCRIPTION = "Image classification where each request trades accuracy for cost by choosing how many tokens are merged."
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
# FastAPI's telemetry would look up its providers at every request.
NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


def create_app(service: Service) -> FastAPI:
    """Make the application around a service. Its lifespan starts and stops the service.

    Raises: SettingsError for unreadable API keys or a bad trace endpoint.
    """
    keys, tracing = read_keys(service.settings), open_tracing(service.settings)

    @asynccontextmanager
    async def run_service(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title=TITLE,
        version=__version__,
        description=DESCRIPTION,
        lifespan=run_service,
        # A redirect would make the client send the image twice.
        redirect_slashes=False,
        # Replaced by `docs`, which sets a content policy.
        docs_url=None,
        redoc_url=None,
        telemetry=NO_TELEMETRY,
    )
    routers = [part.make_router(service) for part in (classify, models, v2, health)]
    for router in (*routers, docs.make_router(TITLE)):
        app.include_router(router)
    translate_framework_errors(app)
    app.add_middleware(
        Boundary,
        metrics=service.metrics,
        keys=keys,
        tracing=tracing,
        inference_paths=inference_paths(route for router in routers for route in router.routes),
    )
    settings = service.settings
    app.add_middleware(
        BodyLimit, max_body_bytes=settings.max_body_bytes, max_in_flight_bytes=settings.max_in_flight_bytes
    )
    app.add_middleware(CloseConnections, is_draining=lambda: service.is_draining)
    _extend_openapi(app, keys)
    return app


def open_tracing(settings: Settings) -> "Tracing | None":
    """Open the trace exporter, or return None if tracing is off.

    Raises: SettingsError for an invalid variable of OpenTelemetry (`OTEL_…`).
    """
    if settings.trace_endpoint is None:
        return None
    try:
        # Imported only here: its libraries cost memory and start-up time.
        module = importlib.import_module("app.observability.tracing")
        tracing: Tracing = module.Tracing(settings.trace_endpoint, settings.trace_sample_ratio)
    except ValueError as error:
        raise SettingsError(f"DTEM_TRACE_ENDPOINT={settings.trace_endpoint}: {error}") from error
    return tracing


def _extend_openapi(app: FastAPI, keys: Keys) -> None:
    """Add the schemas that no route declares as its model, and the security schemes if keys are required."""
    describe = app.openapi

    def describe_extended() -> dict[str, Any]:
        schema = describe()
        components = schema.setdefault("components", {})
        for model in (Problem, InferRequest, RequestInput, RequestOutput):
            _add_schema(components.setdefault("schemas", {}), model)
        if keys.are_required:
            components["securitySchemes"] = SECURITY_SCHEMES
            schema["security"] = [{name: []} for name in SECURITY_SCHEMES]
            for path in filter(is_open, schema["paths"]):
                for operation in schema["paths"][path].values():
                    operation["security"] = []
        return schema

    app.openapi = describe_extended  # type: ignore[method-assign]


def _add_schema(schemas: dict[str, Any], model: type[BaseModel]) -> None:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    # The nested models are added separately.
    schema.pop("$defs", None)
    schemas.setdefault(model.__name__, schema)
