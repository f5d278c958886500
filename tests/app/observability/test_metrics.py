import pytest
from prometheus_client import CollectorRegistry, generate_latest

from app.errors import PROBLEMS
from app.observability.metrics import Metrics
from tests.app.conftest import ClientFactory
from tests.app.odd_images import encode, make_photo

PNG = encode(make_photo(9, 9), "PNG")


class Floors:
    """An engine two of whose versions have raised their floors."""

    def depths_by_label(self) -> dict[tuple[str, str, str], int]:
        return {}

    def floors(self) -> dict[tuple[str, str, str], int]:
        return {("vit", "1", "tome"): 8, ("vit", "2", "tome"): 16, ("vit", "3", "tome"): 4}


def exposed(metrics: Metrics) -> list[str]:
    return generate_latest(metrics.registry).decode().splitlines()


def test_counters_of_rare_events_begin_at_zero() -> None:
    lines = exposed(Metrics(CollectorRegistry()))
    for _, reason in PROBLEMS.values():
        assert f'dtem_refusals_total{{reason="{reason}"}} 0.0' in lines
    assert 'dtem_deadline_misses_total{reason="deadline_passed"} 0.0' in lines
    assert 'dtem_cancelled_total{reason="waiting"} 0.0' in lines
    assert 'dtem_reloads_total{result="refused"} 0.0' in lines


def test_the_floor_of_a_policy_is_the_highest_of_its_versions() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.watch(lambda: True, Floors(), lambda: 0)
    assert [line for line in exposed(metrics) if line.startswith("dtem_rate_floor{")] == [
        'dtem_rate_floor{model="vit",policy="tome"} 16.0'
    ]


def test_gmacs_taken_and_saved_add_up_to_those_unmerged(make_client: ClientFactory) -> None:
    client = make_client()
    client.post("/classify?r=16", content=PNG)
    r16 = 'model="tiny",policy="tome",r="16"'
    counted = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines())
    taken, saved = (float(counted[f"{name}{{{r16}}}"]) for name in ("dtem_gmacs_total", "dtem_gmacs_saved_total"))
    assert (taken, saved) == pytest.approx((1 - 16 / 50, 16 / 50))


def test_a_refused_request_leaves_no_empty_histograms(make_client: ClientFactory) -> None:
    client = make_client()
    client.post("/classify?r=3", content=PNG)
    text = client.get("/metrics").text
    assert 'dtem_requests_total{code="422"' in text
    assert "dtem_stage_seconds_bucket{" not in text
