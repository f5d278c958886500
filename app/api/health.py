"""`GET /health/live`, `/health/ready` and `/metrics`, for orchestrators and Prometheus."""

import asyncio

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.api.schemas import Health, describe_problems
from app.serving.service import Service


def make_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/health/live",
        summary="Liveness: the engine responds; if not, restart the process",
        responses=describe_problems(503),
    )
    async def show_liveness() -> Health:
        service.require_alive()
        return Health(status="alive")

    @router.get(
        "/health/ready",
        summary="Readiness: models verified, engine responsive, not draining",
        responses=describe_problems(503),
    )
    async def show_readiness() -> Health:
        service.require_accepting()
        return Health(status="ready")

    @router.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **describe_problems(401)},
    )
    async def show_metrics() -> Response:
        # In a thread, because the kernel takes milliseconds to count.
        await asyncio.to_thread(service.metrics.memory.read)
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
