"""`POST /classify`: classify the image in the body, or the images of a form."""

import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from app.api.inference import (
    INFERENCE,
    RECORD,
    PlainRoute,
    note_selection,
    probabilities_of,
    require_task,
    server_timing,
    while_connected,
)
from app.api.parameters import describe_query, read_query
from app.api.problems import problem_document
from app.api.schemas import Classification, Results, describe_problems
from app.api.uploads import Upload, form_boundary, read_form, read_image
from app.errors import ClientGone, ServiceError
from app.observability.record import RequestRecord
from app.serving.entry import Outcome
from app.serving.service import Service
from app.store.manifest import Manifest
from app.store.outputs import LOGITS
from app.store.selection import Query, Selection, select

TASK = "classify"
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
    "description": "an image, detected from its bytes regardless of Content-Type, or a form with `file` parts",
    "content": {**dict.fromkeys(IMAGE_TYPES, BINARY), "multipart/form-data": {"schema": FORM}},
}
SERVER_TIMING = {"Server-Timing": {"description": "the stages of `timings_ms`", "schema": {"type": "string"}}}


def make_router(service: Service) -> APIRouter:
    router = APIRouter(route_class=PlainRoute)

    @router.post(
        "/classify",
        summary="Classify images",
        response_model=Classification | Results,
        responses={
            200: {"headers": SERVER_TIMING},
            **describe_problems(400, 401, 404, 408, 413, 414, 415, 422, 429, 431, 500, 501, 503, 504),
        },
        openapi_extra={"requestBody": BODY, "parameters": describe_query(), **INFERENCE},
    )
    async def classify(request: Request) -> JSONResponse:
        """The body is an image, or a multipart form with one or more `file` parts. A form returns a list with the
        result or the problem of each file. `r` is used exactly as given or refused; with `allow_degrade` or `max_r` a
        higher rate may be used under load. Probabilities are a softmax over all labels, or, of a model whose
        `activation` is sigmoid, of each label by itself: then several labels can apply, and they do not add up to 1.
        """
        return await _classify(service, request, read_query(request))

    return router


async def _classify(service: Service, request: Request, query: Query) -> JSONResponse:
    record: RequestRecord = request.scope[RECORD]
    chosen = select(service.require_ready(), query)
    require_task(chosen, TASK)
    note_selection(record, chosen)
    boundary = form_boundary(request.headers.get("content-type"))
    uploads = await _read_uploads(request, boundary, service.settings.max_files)
    started_at = time.perf_counter()
    work = service.infer(chosen, [upload.data for upload in uploads], record)
    outcomes = await while_connected(request, work)
    record.total_seconds = time.perf_counter() - started_at
    if boundary is None:
        return _render(_describe(outcomes[0], chosen, record), record)
    named = zip(outcomes, [upload.filename for upload in uploads], strict=True)
    return _render({"results": [_describe_file(outcome, name, chosen, record) for outcome, name in named]}, record)


async def _read_uploads(request: Request, boundary: bytes | None, max_files: int) -> list[Upload]:
    try:
        return [await read_image(request)] if boundary is None else await read_form(request, boundary, max_files)
    except ClientDisconnect as error:
        raise ClientGone("The client disconnected before the body was complete.") from error


def _describe(outcome: Outcome, chosen: Selection, record: RequestRecord) -> dict[str, Any]:
    """Raises: ServiceError, if that is the outcome."""
    if isinstance(outcome, ServiceError):
        # The boundary counts it.
        record.refusals.clear()
        raise outcome
    manifest, spec = chosen.model.manifest, outcome.variant.spec
    return {
        "predictions": _rank(outcome.outputs[LOGITS], manifest, chosen.top_k),
        "model": {"name": manifest.name, "version": manifest.version},
        "policy": spec.policy,
        "r": spec.r,
        "gmacs": outcome.gmacs,
        "accuracy": outcome.variant.accuracy,
        "tokens": outcome.tokens,
        "batch_size": outcome.batch_size,
        "degraded": outcome.is_degraded,
        "timings_ms": {
            "decode": round(outcome.decode_seconds * 1e3, 3),
            "queue": round(outcome.wait_seconds * 1e3, 3),
            "inference": round(outcome.inference_seconds * 1e3, 3),
            "total": round((record.total_seconds or 0.0) * 1e3, 3),
        },
    }


def _describe_file(outcome: Outcome, name: str | None, chosen: Selection, record: RequestRecord) -> dict[str, Any]:
    if isinstance(outcome, ServiceError):
        return {**problem_document(outcome), "filename": name}
    return {**_describe(outcome, chosen, record), "filename": name}


def _rank(logits: NDArray[np.float32], manifest: Manifest, top_k: int) -> list[dict[str, Any]]:
    probabilities, labels = probabilities_of(logits, manifest), manifest.labels
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    return [{"label": labels[i], "index": int(i), "probability": float(probabilities[i])} for i in best]


def _render(document: dict[str, Any], record: RequestRecord) -> JSONResponse:
    return JSONResponse(document, headers=server_timing(record))
