"""The application: routes and limits around a service that is passed in. Nothing is built at import."""

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
from app.api.shutdown import EndConnections
from app.api.v2 import routes as v2
from app.api.v2.messages import InferRequest, RequestInput, RequestOutput
from app.errors import SettingsError
from app.serving.service import Service
from app.settings import Settings

if TYPE_CHECKING:
    from app.observability.tracing import Tracing

DESCRIPTION = "Image classification in which each request chooses how many tokens are merged, and so its cost."


TITLE = "dtem-serve"
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
# FastAPI's own telemetry would look for providers at every request.
NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


def create_app(service: Service) -> FastAPI:
    """Build the application around a service; it starts and stops the service with itself.

    Raises: SettingsError for keys that cannot be read, or traces that cannot be sent.
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
        # Ours has a content policy.
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
    app.add_middleware(EndConnections, is_draining=lambda: service.is_draining)
    _complete_document(app, keys)
    return app


def open_tracing(settings: Settings) -> "Tracing | None":
    """Open what sends traces, if they are wanted.

    Raises: SettingsError for a variable of OpenTelemetry's own (`OTEL_…`) that it refuses.
    """
    if settings.trace_endpoint is None:
        return None
    try:
        module = importlib.import_module("app.observability.tracing")  # its libraries cost memory and time at the start
        tracing: Tracing = module.Tracing(settings.trace_endpoint, settings.trace_sample_ratio)
    except ValueError as error:
        raise SettingsError(f"DTEM_TRACE_ENDPOINT={settings.trace_endpoint}: {error}") from error
    return tracing


def _complete_document(app: FastAPI, keys: Keys) -> None:
    """Add to the OpenAPI document the schemas that no route returns or reads as its model, and the keys if any."""
    describe = app.openapi

    def describe_completely() -> dict[str, Any]:
        schema = describe()
        components = schema.setdefault("components", {})
        for model in (Problem, InferRequest, RequestInput, RequestOutput):
            _add_schema(components.setdefault("schemas", {}), model)
        if keys.are_needed:
            components["securitySchemes"] = SECURITY_SCHEMES
            schema["security"] = [{name: []} for name in SECURITY_SCHEMES]
            for path in filter(is_open, schema["paths"]):
                for operation in schema["paths"][path].values():
                    operation["security"] = []
        return schema

    app.openapi = describe_completely  # type: ignore[method-assign]


def _add_schema(schemas: dict[str, Any], model: type[BaseModel]) -> None:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # each is added on its own
    schemas.setdefault(model.__name__, schema)
