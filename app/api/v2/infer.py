"""Infer: one inference request, from its bytes to those of the response."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import Request
from fastapi.responses import Response

from app.api.inference import RECORD, note_selection, read_body, server_timing, while_connected
from app.api.v2.encoding import IDENTITY, choose_encoding, compress, decompress, read_encoding
from app.api.v2.request import HEADER_LENGTH, InferenceRequest, measure_json, parse_request
from app.api.v2.response import Rendered, count_json_numbers, render_response
from app.api.v2.statistics import Statistics
from app.errors import ServiceError
from app.observability.record import ImageResult, RequestRecord
from app.serving.entry import Outcome
from app.serving.service import Service
from app.store.catalogue import ServedModel
from app.store.selection import select

T = TypeVar("T")
# Larger ones take more than about a millisecond and run in a thread, so as not to block the event loop.
LARGE_BYTES = 20_000
LARGE_NUMBERS = 1_000


class InferHandler:
    def __init__(self, service: Service) -> None:
        self._service = service
        self.statistics = Statistics()
        # One at a time: each holds the GIL for up to 0.1 s, and the event loop has to get it in between.
        self._parser = ThreadPoolExecutor(1, thread_name_prefix="json")

    async def infer(self, request: Request, model: ServedModel) -> Response:
        """Answer a request, and add it to the statistics.

        Raises: ServiceError.
        """
        record: RequestRecord = request.scope[RECORD]
        started_at = time.perf_counter()
        try:
            rendered, results = await self._infer(request, model, record)
        except ServiceError:
            self.statistics.add_failure(model.manifest, time.perf_counter() - started_at)
            raise
        self.statistics.add_success(model.manifest, results, record)
        return await _compress(rendered, request, record)

    async def _infer(
        self, request: Request, model: ServedModel, record: RequestRecord
    ) -> tuple[Rendered, list[ImageResult]]:
        encoding = read_encoding(request.headers.get("content-encoding"))
        body = await read_body(request)
        started_at = time.perf_counter()
        parsed = await self._parse(body, encoding, request.headers.get(HEADER_LENGTH), model)
        chosen = select(self._service.require_ready(), parsed.query)
        note_selection(record, chosen)
        outcomes = await while_connected(request, self._service.infer(chosen, parsed.images, record))
        record.total_seconds = time.perf_counter() - started_at
        results = _require_all(outcomes, record)
        is_slow = count_json_numbers(parsed, len(model.manifest.labels)) > LARGE_NUMBERS
        rendered = await _run(is_slow, lambda: render_response(parsed, results, model.manifest, record))
        return rendered, results

    async def _parse(self, body: bytes, encoding: str, header: str | None, model: ServedModel) -> InferenceRequest:
        limit, max_images = self._service.settings.max_body_bytes, self._service.settings.max_files
        plain = await _run(encoding != IDENTITY, lambda: decompress(body, encoding, limit))
        if measure_json(plain, header) <= LARGE_BYTES:
            return parse_request(plain, header, model, max_images)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._parser, parse_request, plain, header, model, max_images)


def _require_all(outcomes: Sequence[Outcome], record: RequestRecord) -> list[ImageResult]:
    """Return the results. The protocol has no error for a single image, so one error fails the request.

    Raises: ServiceError, the first one, with the index of its image.
    """
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, ServiceError):
            # The boundary counts it.
            record.refusals.clear()
            raise outcome.about(f"Image {index}")
    return [outcome for outcome in outcomes if isinstance(outcome, ImageResult)]


async def _compress(rendered: Rendered, request: Request, record: RequestRecord) -> Response:
    """Compress a response as the client accepts. The header with the JSON length counts uncompressed bytes."""
    headers = {**rendered.headers, **server_timing(record), "Vary": "Accept-Encoding"}
    encoding = choose_encoding(request.headers.get("accept-encoding"))
    if encoding == IDENTITY:
        return Response(rendered.body, headers=headers)
    body = await _run(len(rendered.body) > LARGE_BYTES, lambda: compress(rendered.body, encoding))
    return Response(body, headers={**headers, "Content-Encoding": encoding})


async def _run(is_slow: bool, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if is_slow else work()
