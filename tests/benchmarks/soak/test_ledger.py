from collections import Counter

from prometheus_client import CollectorRegistry, generate_latest

from app.observability.metrics import Metrics
from app.observability.record import RequestRecord
from benchmarks.soak.ledger import Account, Ledger, RanVariant, compare_ledgers, read_ledger, read_variant
from benchmarks.soak.requests import UNSEEN
from tests.benchmarks.answers import classified, make_result

V2 = {"model_name": "reference", "model_version": "5", "parameters": {"policy": "tome", "r": 8}, "outputs": []}


def ledger(**entries: int) -> Ledger:
    """Make a ledger from names like `tome_8_200`; `none_422` for requests without a variant."""
    parts = {name: name.split("_") for name in entries}
    return Counter(
        {
            Account(*(("", "") if part[0] == "none" else (part[0], part[1])), int(part[-1])): entries[name]
            for name, part in parts.items()
        }
    )


SEEN = [
    *[make_result(200, 5, classified("tome", 8))] * 3,
    make_result(200, 5, classified("atm", None)),
    *[make_result(422, 1)] * 2,
    make_result(0),
]


def test_the_ledger_is_read_from_real_metrics() -> None:
    metrics = Metrics(CollectorRegistry())
    for record, code in (
        (RequestRecord(model="reference", policy="tome", r="8"), 200),
        (RequestRecord(model="reference", policy="tome", r="8"), 200),
        (RequestRecord(model="reference", policy="atm", r=""), 499),
        (RequestRecord(), 422),
    ):
        metrics.observe(record, code)
    assert read_ledger(generate_latest(metrics.registry).decode()) == ledger(tome_8_200=2, atm__499=1, none_422=1)


def test_the_variant_is_read_from_every_kind_of_answer() -> None:
    for document, variant in (
        (classified("tome", 8), RanVariant("4", "tome", "8")),
        (classified("atm", None), RanVariant("4", "atm", "")),
        ({"results": [{"status": 400}, classified("dtem", 2)]}, RanVariant("4", "dtem", "2")),
        ({"results": [{"status": 400}]}, None),
        (V2, RanVariant("5", "tome", "8")),
    ):
        assert read_variant(make_result(200, 1, document).body) == variant


def test_requests_of_clients_that_disconnected_may_have_any_outcome() -> None:
    for unseen in ({"tome_8_499": 1}, {"tome_8_429": 1}):
        counted = ledger(tome_8_200=3, atm__200=1, none_422=2, **unseen)
        assert compare_ledgers(counted, SEEN, UNSEEN) == []
    assert compare_ledgers(ledger(tome_8_200=4, atm__200=1, none_422=2), SEEN, UNSEEN) == []


def test_every_difference_is_found() -> None:
    for counted, message in (
        (ledger(tome_8_200=3, atm__200=1, none_422=2), "counted 6 requests, the clients sent 7"),
        (ledger(tome_8_200=3, atm__200=1, none_422=3), "code 422"),
        (ledger(tome_8_200=3, atm__200=1, none_422=1, tome_8_499=2), "code 422: the server counted 1, the clients 2"),
        (ledger(tome_8_200=3, atm__200=1, none_422=2, tome_8_500=1), "code 500"),
        (ledger(tome_8_200=2, tome_0_200=1, atm__200=1, none_422=2, none_499=1), "policy 'tome' r '8'"),
        (ledger(tome_8_200=5, atm__200=1, none_422=2), "counted 8 requests"),
    ):
        assert message in "; ".join(compare_ledgers(counted, SEEN, UNSEEN)), counted


def test_disconnected_clients_explain_no_more_than_their_number() -> None:
    seen = [make_result(200, 5, classified("tome", 8)), make_result(0), make_result(429, 1)]
    counted = ledger(tome_8_200=1, tome_0_200=1, dtem_2_200=1)
    assert "by variant, the server counted 2 answers more" in "; ".join(compare_ledgers(counted, seen, UNSEEN))
