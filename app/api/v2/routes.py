"""Routes under `/v2`: metadata, health, statistics and inference."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from app.api.inference import INFERENCE
from app.api.parameters import accept_parameters
from app.api.schemas import DESCRIPTIONS
from app.api.v2.infer import InferHandler
from app.api.v2.messages import (
    IndexEntry,
    InferResponse,
    Live,
    ModelConfig,
    ModelMetadata,
    ModelNames,
    ModelReady,
    ProtocolError,
    Ready,
    ServerMetadata,
)
from app.api.v2.metadata import configure_model, describe_model, describe_server, list_versions
from app.api.v2.statistics import AllStatistics
from app.errors import PROBLEMS
from app.serving.service import Service
from app.store.catalogue import ServedModel

BINARY = {"schema": {"type": "string", "format": "binary"}}
REQUEST_BODY = {
    "required": True,
    "description": "JSON; with Inference-Header-Content-Length, JSON of that length followed by binary tensors",
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}},
        "application/octet-stream": BINARY,
    },
}
# 405 is of other methods, and 499 reaches no client.
UNDOCUMENTED = (405, 499)
INFER_STATUSES = sorted({status for status, _ in PROBLEMS.values()} - set(UNDOCUMENTED))
Find = Callable[..., Awaitable[ServedModel]]


def make_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"], dependencies=[Depends(accept_parameters())])
    handler = InferHandler(service)

    async def find_newest(name: str) -> ServedModel:
        return service.require_ready().find(name, None)

    async def find_version(name: str, version: str) -> ServedModel:
        return service.require_ready().find(name, version)

    _add_server_routes(router, service)
    _add_overall_statistics(router, service, handler)
    finders: dict[str, Find] = {"/models/{name}": find_newest, "/models/{name}/versions/{version}": find_version}
    for path, find in finders.items():
        _add_model_routes(router, service, path, find)
        _add_inference_routes(router, service, handler, path, find)
    return router


def _add_server_routes(router: APIRouter, service: Service) -> None:
    @router.get("", summary="Server name, version and extensions", responses=describe_errors(401, 422))
    async def show_server(request: Request) -> ServerMetadata:
        return describe_server(request.app.version)

    @router.get("/health/live", summary="Liveness", responses=describe_errors(422, 503))
    async def show_liveness() -> Live:
        service.require_alive()
        return Live(live=True)

    @router.get("/health/ready", summary="Readiness", responses=describe_errors(422, 503))
    async def show_readiness() -> Ready:
        service.require_accepting()
        return Ready(ready=True)

    @router.get("/models", summary="List model names", responses=describe_errors(401, 422, 503))
    async def list_models() -> ModelNames:
        return ModelNames(models=sorted(service.require_ready().models))

    @router.post("/repository/index", summary="List all model versions", responses=describe_errors(401, 422, 503))
    async def list_repository() -> list[IndexEntry]:
        catalogue = service.require_ready()
        manifests = [model.manifest for model in catalogue.all_models()]
        served = [IndexEntry(name=item.name, version=item.version, state="READY", reason="") for item in manifests]
        refused = [
            IndexEntry(name=name, version=str(number), state="UNAVAILABLE", reason=refusal.summary)
            for (name, number), refusal in sorted(catalogue.refused.items())
        ]
        return served + refused


def _add_overall_statistics(router: APIRouter, service: Service, handler: InferHandler) -> None:
    """Add the route that must precede `/models/{name}`, which would match it."""

    @router.get("/models/stats", summary="Statistics of all models", responses=describe_errors(401, 422, 503))
    async def show_statistics() -> AllStatistics:
        manifests = [model.manifest for model in service.require_ready().all_models()]
        return handler.statistics.describe(manifests)


def _add_model_routes(router: APIRouter, service: Service, path: str, find: Find) -> None:
    errors = describe_errors(401, 404, 422, 503)

    @router.get(path, summary="Model inputs and outputs", responses=errors)
    async def show_model(model: Annotated[ServedModel, Depends(find)]) -> ModelMetadata:
        versions = list_versions(service.require_ready(), model.manifest.name)
        return describe_model(model.manifest, versions, service.settings.engine)

    @router.get(f"{path}/ready", summary="Model readiness", responses=errors)
    async def show_model_readiness(model: Annotated[ServedModel, Depends(find)]) -> ModelReady:
        return ModelReady(name=model.manifest.name, ready=True)

    @router.get(
        f"{path}/config",
        summary="Triton model configuration",
        response_model_exclude_none=True,
        responses=errors,
    )
    async def show_configuration(model: Annotated[ServedModel, Depends(find)]) -> ModelConfig:
        return configure_model(model.manifest, service.settings.engine, service.settings.max_files)


def _add_inference_routes(router: APIRouter, service: Service, handler: InferHandler, path: str, find: Find) -> None:
    @router.get(
        f"{path}/stats",
        summary="Model statistics",
        responses=describe_errors(401, 404, 422, 503),
    )
    async def show_statistics(request: Request, model: Annotated[ServedModel, Depends(find)]) -> AllStatistics:
        versions = service.require_ready().models[model.manifest.name]
        chosen = [model] if "version" in request.path_params else [versions[number] for number in sorted(versions)]
        return handler.statistics.describe([item.manifest for item in chosen])

    @router.post(
        f"{path}/infer",
        summary="Classify images",
        response_model=InferResponse,
        responses={
            200: {"content": {"application/octet-stream": BINARY}},
            **describe_errors(*INFER_STATUSES),
        },
        openapi_extra={"requestBody": REQUEST_BODY, **INFERENCE},
    )
    async def infer(request: Request, model: Annotated[ServedModel, Depends(find)]) -> Response:
        """Takes one input, pixels or image files. `docs/open-inference-protocol.md` has examples of each format."""
        return await handler.infer(request, model)


def describe_errors(*statuses: int) -> dict[int | str, dict[str, object]]:
    """Document the error responses of a route."""
    return {status: {"description": DESCRIPTIONS[status], "model": ProtocolError} for status in statuses}
