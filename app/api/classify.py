"""`POST /classify`: an image, or a form of them, and the classes it shows."""

import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.boundary import CLASSIFY_PATH, EXCHANGE
from app.api.documents import Classification, Results, describe_problems
from app.api.exchanges import note_variant, server_timing, softmax, while_connected
from app.api.parameters import describe_query, read_query
from app.api.uploads import Upload, form_boundary, read_form, read_image
from app.backends import Logits
from app.errors import ClientGone, ServiceError, problem_document
from app.metrics import Exchange
from app.selection import Query, Selection, select
from app.serving.service import Classified, Service

BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "array", "minItems": 1, "items": BINARY["schema"]}},
}
IMAGE_TYPES = (
    "application/octet-stream",
    "image/jpeg",
    "image/png",
    "image/webp",
    "image/gif",
    "image/bmp",
    "image/tiff",
)
BODY = {
    "required": True,
    "description": "the image itself, recognised by its bytes whatever the Content-Type, or a form with `file` parts",
    "content": {**dict.fromkeys(IMAGE_TYPES, BINARY), "multipart/form-data": {"schema": FORM}},
}
SERVER_TIMING = {"Server-Timing": {"description": "the stages of `timings_ms`", "schema": {"type": "string"}}}


class Directly:
    """Pure ASGI middleware, the innermost: brings requests to `/classify` to their endpoint, past the framework's
    routing, which would take a sixth of the whole answer's time. The route that `make_router` adds documents it.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._route = next(route for route in make_router(service).routes if isinstance(route, APIRoute))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != CLASSIFY_PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route
        response = await self._route.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def make_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post(
        CLASSIFY_PATH,
        summary="Classify one image, or several",
        response_model=Classification | Results,
        responses={
            200: {"headers": SERVER_TIMING},
            **describe_problems(400, 401, 404, 413, 415, 422, 429, 500, 503, 504),
        },
        openapi_extra={"requestBody": BODY, "parameters": describe_query()},
    )
    async def classify(request: Request) -> JSONResponse:
        """The body is the image, or a multipart form with one or more parts named `file`: then a list comes back, in
        which each file has its own result or its own problem. A rate `r` is used exactly as asked, or refused, unless
        `allow_degrade` or `max_r` consents to a higher one under load.
        """
        return await _classify(service, request, read_query(request))

    return router


async def _classify(service: Service, request: Request, query: Query) -> JSONResponse:
    exchange: Exchange = request.scope[EXCHANGE]
    chosen = select(service.require_ready(), query)
    note_variant(exchange, chosen)
    boundary = form_boundary(request.headers.get("content-type"))
    uploads = await _read_uploads(request, boundary, service.settings.max_files)
    started_at = time.perf_counter()
    work = service.classify(chosen, [upload.data for upload in uploads], exchange)
    outcomes = await while_connected(request, work)
    exchange.total_seconds = time.perf_counter() - started_at
    if boundary is None:
        return _render(_describe(outcomes[0], chosen, exchange), exchange)
    named = zip(outcomes, [upload.filename for upload in uploads], strict=True)
    return _render({"results": [_describe_file(outcome, name, chosen, exchange) for outcome, name in named]}, exchange)


async def _read_uploads(request: Request, boundary: bytes | None, max_files: int) -> list[Upload]:
    try:
        return [await read_image(request)] if boundary is None else await read_form(request, boundary, max_files)
    except ClientDisconnect as error:
        raise ClientGone("The caller left before the body was complete.") from error


def _describe(outcome: Classified | ServiceError, chosen: Selection, exchange: Exchange) -> dict[str, Any]:
    """Raises: the outcome, if it is an error."""
    if isinstance(outcome, ServiceError):
        exchange.refusals.clear()  # the boundary counts it
        raise outcome
    manifest, done = chosen.model.manifest, outcome.done
    entry = done.variant.entry
    return {
        "predictions": _rank(done.logits, manifest.labels, chosen.top_k),
        "model": {"name": manifest.name, "version": manifest.version},
        "policy": entry.policy,
        "r": entry.r,
        "gmacs": entry.gmacs if done.gmacs is None else done.gmacs,
        "accuracy": None if entry.accuracy is None else entry.accuracy.model_dump(mode="json"),
        "tokens": entry.tokens if done.tokens is None else done.tokens,
        "batch_size": done.batch_size,
        "degraded": done.is_degraded,
        "timings_ms": {
            "decode": round(outcome.decode_seconds * 1e3, 3),
            "queue": round(done.queue_seconds * 1e3, 3),
            "inference": round(done.inference_seconds * 1e3, 3),
            "total": round((exchange.total_seconds or 0.0) * 1e3, 3),
        },
    }


def _describe_file(
    outcome: Classified | ServiceError, name: str | None, chosen: Selection, exchange: Exchange
) -> dict[str, Any]:
    if isinstance(outcome, ServiceError):
        return {**problem_document(outcome), "filename": name}
    return {**_describe(outcome, chosen, exchange), "filename": name}


def _rank(logits: Logits, labels: tuple[str, ...], top_k: int) -> list[dict[str, Any]]:
    probabilities = softmax(logits)
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    return [{"label": labels[i], "index": int(i), "probability": float(probabilities[i])} for i in best]


def _render(document: dict[str, Any], exchange: Exchange) -> JSONResponse:
    return JSONResponse(document, headers=server_timing(exchange))
