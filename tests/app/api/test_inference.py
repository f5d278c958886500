"""Inference routes: requests are counted for marked routes only."""

from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from starlette.testclient import TestClient

from app.api.boundary import Boundary
from app.api.inference import INFERENCE, inference_paths
from app.api.keys import Keys
from app.observability.metrics import Metrics

router = APIRouter()


@router.post("/segment/{model}", openapi_extra={**INFERENCE, "x-other": 1})
def segment(model: str) -> str:
    return model


@router.post("/plain")
@router.post("/described", openapi_extra={"x-other": 1})
def unmarked() -> str:
    return "unmarked"


def count_requests(path: str) -> int:
    """Post to a path; return the number of requests counted."""
    metrics, app = Metrics(CollectorRegistry()), FastAPI()
    app.include_router(router)
    app.add_middleware(
        Boundary, metrics=metrics, keys=Keys([]), tracing=None, inference_paths=inference_paths(router.routes)
    )
    assert TestClient(app).post(path).status_code == 200
    lines = generate_latest(metrics.registry).decode().splitlines()
    return sum(line.startswith("dtem_requests_total{") for line in lines)


def test_requests_to_a_marked_route_are_counted() -> None:
    assert count_requests("/segment/vit") == 1


def test_requests_to_unmarked_routes_are_not_counted() -> None:
    assert count_requests("/plain") == 0
    assert count_requests("/described") == 0


def test_inference_paths_match_whole_paths_of_marked_routes() -> None:
    (path,) = inference_paths(router.routes)
    assert path.fullmatch("/segment/vit")
    assert not path.fullmatch("/segment/vit/masks")
