"""`GET /health/live`, `/health/ready` and `/metrics`: what orchestrators and Prometheus ask."""

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.api.documents import Health, describe_problems
from app.serving.service import Service


def make_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health/live", summary="The process runs")
    async def show_liveness() -> Health:
        return Health(status="alive")

    @router.get(
        "/health/ready",
        summary="Every model is loaded, its golden outputs matched, and the engine answers",
        responses=describe_problems(503),
    )
    async def show_readiness() -> Health:
        service.require_ready()
        return Health(status="ready")

    @router.get(
        "/metrics",
        summary="Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **describe_problems(401)},
    )
    async def show_metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
