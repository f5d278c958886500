import pytest
from prometheus_client import CollectorRegistry, generate_latest

from app.errors import PROBLEMS
from app.observability.metrics import Metrics
from tests.app.conftest import ClientFactory
from tests.app.odd_images import encode, make_photo

PNG = encode(make_photo(9, 9), "PNG")


class EngineWithFloors:
    """An engine with raised rate floors for several versions."""

    def depths_by_label(self) -> dict[tuple[str, str, str], int]:
        return {}

    def floors(self) -> dict[tuple[str, str, str], int]:
        return {("vit", "1", "tome"): 8, ("vit", "2", "tome"): 16, ("vit", "3", "tome"): 4}


def exposition(metrics: Metrics) -> list[str]:
    return generate_latest(metrics.registry).decode().splitlines()


def test_counters_of_rare_events_start_at_zero() -> None:
    lines = exposition(Metrics(CollectorRegistry()))
    for _, reason in PROBLEMS.values():
        assert f'dtem_refusals_total{{reason="{reason}"}} 0.0' in lines
    assert 'dtem_deadline_misses_total{reason="deadline_passed"} 0.0' in lines
    assert 'dtem_cancelled_total{reason="waiting"} 0.0' in lines
    assert 'dtem_reloads_total{result="refused"} 0.0' in lines


def test_rate_floor_of_a_policy_is_the_maximum_over_versions() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.watch(lambda: True, EngineWithFloors(), lambda: 0)
    assert [line for line in exposition(metrics) if line.startswith("dtem_rate_floor{")] == [
        'dtem_rate_floor{model="vit",policy="tome"} 16.0'
    ]


def test_gmacs_computed_and_saved_add_up_to_the_unmerged_cost(make_client: ClientFactory) -> None:
    client = make_client()
    client.post("/classify?r=16", content=PNG)
    r16 = 'model="tiny",policy="tome",r="16"'
    counted = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines())
    computed, saved = (float(counted[f"{name}{{{r16}}}"]) for name in ("dtem_gmacs_total", "dtem_gmacs_saved_total"))
    assert (computed, saved) == pytest.approx((1 - 16 / 50, 16 / 50))


def test_refused_request_creates_no_empty_histograms(make_client: ClientFactory) -> None:
    client = make_client()
    client.post("/classify?r=3", content=PNG)
    text = client.get("/metrics").text
    assert 'dtem_requests_total{code="422"' in text
    assert "dtem_stage_seconds_bucket{" not in text
