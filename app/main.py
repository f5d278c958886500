"""The application: routes and limits around a service that is passed in. Nothing is built at import."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from app.api import classify, health, models
from app.api.boundary import Boundary, translate_framework_errors
from app.api.documents import Problem
from app.api.inference_protocol import routes as inference_protocol
from app.api.inference_protocol.documents import InferRequest, RequestInput, RequestOutput
from app.limits import BodyLimit
from app.serving.service import Service

DESCRIPTION = "Image classification in which each request chooses how many tokens are merged, and so its cost."


def create_app(service: Service) -> FastAPI:
    """Build the application around a service; it starts and stops the service with itself."""

    @asynccontextmanager
    async def run_service(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="dtem-serve",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=run_service,
        redirect_slashes=False,  # a redirect would make the caller send the image twice
        redoc_url=None,  # `/docs` is enough; its scripts come from a CDN, so it needs a browser with internet access
    )
    for part in (classify, models, inference_protocol, health):
        app.include_router(part.make_router(service))
    translate_framework_errors(app)
    app.add_middleware(Boundary, metrics=service.metrics)
    app.add_middleware(BodyLimit, max_body_bytes=service.settings.max_body_bytes)
    _document_schemas(app)
    return app


def _document_schemas(app: FastAPI) -> None:
    """Add the schemas that no route returns or reads as its model."""
    describe = app.openapi
    models = (Problem, InferRequest, RequestInput, RequestOutput)

    def describe_with_schemas() -> dict[str, Any]:
        document = describe()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in models:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schema.pop("$defs", None)  # each is a model of its own here
            schemas.setdefault(model.__name__, schema)
        return document

    app.openapi = describe_with_schemas  # type: ignore[method-assign]
