"""Inference routes: requests are counted for marked routes only; a route serves the models of its task only."""

from dataclasses import replace

import numpy as np
import pytest
from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from starlette.testclient import TestClient

from app.api.boundary import Boundary
from app.api.inference import INFERENCE, inference_paths, require_task
from app.api.keys import Keys
from app.api.v2.outputs import list_outputs
from app.errors import InvalidParameter
from app.observability.metrics import Metrics
from app.store.catalogue import Catalogue
from app.store.outputs import TASKS, GraphOutput
from app.store.selection import Query, select

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


def test_model_of_another_task_is_refused(catalogue: Catalogue) -> None:
    chosen = select(catalogue, Query())
    require_task(chosen, "classify")
    manifest = chosen.model.manifest.model_copy(update={"task": "segment"})
    with pytest.raises(
        InvalidParameter, match="'tiny' is for task 'segment'; expected a model for 'classify'"
    ) as caught:
        require_task(replace(chosen, model=replace(chosen.model, manifest=manifest)), "classify")
    assert caught.value.members["field"] == "model"
    assert caught.value.members["accepted"] == ["classify"]


def test_protocol_lists_the_output_of_any_task(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "segment", lambda manifest: GraphOutput("mask", "mask", np.int64, (4, 4)))
    manifest = catalogue.find(None, None).manifest
    names = [output.name for output in list_outputs(manifest)]
    assert names == ["logits", "probabilities", "label", "tokens", "gmacs"]
    mask, *others = list_outputs(manifest.model_copy(update={"task": "segment"}))
    assert (mask.name, mask.datatype, mask.shape, mask.is_classifiable) == ("mask", "INT64", (4, 4), False)
    assert [output.name for output in others] == ["tokens", "gmacs"]
