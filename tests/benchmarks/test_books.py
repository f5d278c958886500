from collections import Counter

from prometheus_client import CollectorRegistry, generate_latest

from app.observability.metrics import Metrics
from app.observability.record import RequestRecord
from benchmarks.books import Book, Entry, Ran, compare_books, read_book, read_ran
from benchmarks.mixed_requests import UNSEEN
from tests.benchmarks.answers import classified, make_exchange

V2 = {"model_name": "reference", "model_version": "5", "parameters": {"policy": "tome", "r": 8}, "outputs": []}


def book(**entries: int) -> Book:
    """Make a book from names like `tome_8_200`; `none_422` for requests that chose no variant."""
    parts = {name: name.split("_") for name in entries}
    return Counter(
        {
            Entry(*(("", "") if part[0] == "none" else (part[0], part[1])), int(part[-1])): entries[name]
            for name, part in parts.items()
        }
    )


SEEN = [
    *[make_exchange(200, 5, classified("tome", 8))] * 3,
    make_exchange(200, 5, classified("atm", None)),
    *[make_exchange(422, 1)] * 2,
    make_exchange(0),
]


def test_the_book_is_read_from_what_the_service_really_says() -> None:
    metrics = Metrics(CollectorRegistry())
    for exchange, code in (
        (RequestRecord(model="reference", policy="tome", r="8"), 200),
        (RequestRecord(model="reference", policy="tome", r="8"), 200),
        (RequestRecord(model="reference", policy="atm", r=""), 499),
        (RequestRecord(), 422),
    ):
        metrics.observe(exchange, code)
    assert read_book(generate_latest(metrics.registry).decode()) == book(tome_8_200=2, atm__499=1, none_422=1)


def test_what_ran_is_read_from_every_kind_of_answer() -> None:
    for document, ran in (
        (classified("tome", 8), Ran("4", "tome", "8")),
        (classified("atm", None), Ran("4", "atm", "")),
        ({"results": [{"status": 400}, classified("dtem", 2)]}, Ran("4", "dtem", "2")),
        ({"results": [{"status": 400}]}, None),
        (V2, Ran("5", "tome", "8")),
    ):
        assert read_ran(make_exchange(200, 1, document).body) == ran


def test_books_that_agree_are_right_whatever_became_of_those_who_left() -> None:
    for unseen in ({"tome_8_499": 1}, {"tome_8_429": 1}):
        counted = book(tome_8_200=3, atm__200=1, none_422=2, **unseen)
        assert compare_books(counted, SEEN, UNSEEN) == []
    assert compare_books(book(tome_8_200=4, atm__200=1, none_422=2), SEEN, UNSEEN) == []


def test_every_disagreement_is_found() -> None:
    for counted, message in (
        (book(tome_8_200=3, atm__200=1, none_422=2), "counted 6 requests, 7 were sent"),
        (book(tome_8_200=3, atm__200=1, none_422=3), "code 422"),
        (book(tome_8_200=3, atm__200=1, none_422=1, tome_8_499=2), "code 422: the server counted 1, its callers saw 2"),
        (book(tome_8_200=3, atm__200=1, none_422=2, tome_8_500=1), "code 500"),
        (book(tome_8_200=2, tome_0_200=1, atm__200=1, none_422=2, none_499=1), "policy 'tome' r '8'"),
        (book(tome_8_200=5, atm__200=1, none_422=2), "counted 8 requests"),
    ):
        assert message in "; ".join(compare_books(counted, SEEN, UNSEEN)), counted


def test_unseen_answers_excuse_no_more_than_their_number() -> None:
    seen = [make_exchange(200, 5, classified("tome", 8)), make_exchange(0), make_exchange(429, 1)]
    counted = book(tome_8_200=1, tome_0_200=1, dtem_2_200=1)
    assert "by variant the server counted 2 answers more" in "; ".join(compare_books(counted, seen, UNSEEN))
