"""Infer: the way of one inference request, from its bytes to the answer's."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi import Request
from fastapi.responses import Response

from app.api.boundary import EXCHANGE
from app.api.exchanges import note_variant, read_body, server_timing, while_connected
from app.api.inference_protocol.encoding import IDENTITY, choose_encoding, compress, decompress, read_encoding
from app.api.inference_protocol.request import HEADER_LENGTH, InferenceRequest, measure_json, parse_request
from app.api.inference_protocol.response import Rendered, count_json_numbers, render_response
from app.api.inference_protocol.statistics import Statistics
from app.catalogue import ServedModel
from app.errors import ServiceError
from app.metrics import Exchange
from app.selection import select
from app.serving.entry import Done
from app.serving.service import Classified, Service

T = TypeVar("T")
# What takes longer than about a millisecond is done in a thread: the event loop serves everyone.
LARGE_BYTES = 20_000
LARGE_NUMBERS = 1_000


class Inferrer:
    def __init__(self, service: Service) -> None:
        self._service = service
        self.statistics = Statistics()

    async def infer(self, request: Request, model: ServedModel) -> Response:
        """Answer a request, and count it.

        Raises: ServiceError.
        """
        exchange: Exchange = request.scope[EXCHANGE]
        started_at = time.perf_counter()
        try:
            rendered, done = await self._infer(request, model, exchange)
        except ServiceError:
            self.statistics.add_failure(model.manifest, time.perf_counter() - started_at)
            raise
        self.statistics.add_success(model.manifest, done, exchange)
        return await _compress(rendered, request, exchange)

    async def _infer(self, request: Request, model: ServedModel, exchange: Exchange) -> tuple[Rendered, Sequence[Done]]:
        encoding = read_encoding(request.headers.get("content-encoding"))
        body = await read_body(request)
        started_at = time.perf_counter()
        asked = await self._parse(body, encoding, request.headers.get(HEADER_LENGTH), model)
        chosen = select(self._service.require_ready(), asked.query)
        note_variant(exchange, chosen)
        outcomes = await while_connected(request, self._service.classify(chosen, asked.images, exchange))
        exchange.total_seconds = time.perf_counter() - started_at
        done = _require_all(outcomes, exchange)
        is_slow = count_json_numbers(asked, len(model.manifest.labels)) > LARGE_NUMBERS
        rendered = await _run(is_slow, lambda: render_response(asked, done, model.manifest, exchange))
        return rendered, done

    async def _parse(self, body: bytes, encoding: str, header: str | None, model: ServedModel) -> InferenceRequest:
        limit, max_images = self._service.settings.max_body_bytes, self._service.settings.max_files
        plain = await _run(encoding != IDENTITY, lambda: decompress(body, encoding, limit))
        is_slow = measure_json(plain, header) > LARGE_BYTES
        return await _run(is_slow, lambda: parse_request(plain, header, model, max_images))


def _require_all(outcomes: Sequence[Classified | ServiceError], exchange: Exchange) -> list[Done]:
    """Return the results, if every image has one: the protocol has no room for one image's own error.

    Raises: the first error, with the place of its image.
    """
    for place, outcome in enumerate(outcomes):
        if isinstance(outcome, ServiceError):
            exchange.refusals.clear()  # the boundary counts it
            raise outcome.about(f"Image {place}")
    return [outcome.done for outcome in outcomes if isinstance(outcome, Classified)]


async def _compress(rendered: Rendered, request: Request, exchange: Exchange) -> Response:
    """Encode an answer as its caller asks; the length of the JSON is that before compression."""
    headers = {**rendered.headers, **server_timing(exchange), "Vary": "Accept-Encoding"}
    encoding = choose_encoding(request.headers.get("accept-encoding"))
    if encoding == IDENTITY:
        return Response(rendered.body, headers=headers)
    body = await _run(len(rendered.body) > LARGE_BYTES, lambda: compress(rendered.body, encoding))
    return Response(body, headers={**headers, "Content-Encoding": encoding})


async def _run(is_slow: bool, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if is_slow else work()
