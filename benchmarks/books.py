"""Books: what the server counted, held against what its callers saw."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.open_loop import LOST, Exchange

REQUESTS = "dtem_requests_total"


@dataclass(frozen=True)
class Entry:
    """A line of the server's book: policy and r are empty where no variant was chosen, r where the policy adapts."""

    policy: str
    r: str
    code: int


Book = Counter[Entry]


@dataclass(frozen=True)
class Ran:
    """What an answer with 200 says ran, as the server would count it."""

    version: str
    policy: str
    r: str


def read_book(metrics: str) -> Book:
    """Read the requests counted from what `/metrics` answered, over all models."""
    book: Book = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == REQUESTS:
                labels = sample.labels
                book[Entry(labels["policy"], labels["r"], int(labels["code"]))] += int(sample.value)
    return book


def read_ran(body: bytes) -> Ran | None:
    """Read what ran from an answer with 200: to one image, to a form (its first good image), or under /v2.

    None for a form without a good image.
    """
    answer: dict[str, Any] = json.loads(body)
    if "model_version" in answer:
        parameters = answer["parameters"]
        return Ran(answer["model_version"], parameters["policy"], _text(parameters.get("r")))
    one = next((item for item in answer.get("results", [answer]) if "predictions" in item), None)
    return None if one is None else Ran(one["model"]["version"], one["policy"], _text(one["r"]))


def _text(r: int | None) -> str:
    return "" if r is None else str(r)


def compare_books(counted: Book, seen: Sequence[Exchange], unseen_codes: frozenset[int]) -> list[str]:
    """List what does not add up.

    counted: what the server's book grew by; unseen_codes: with which it may have counted callers who did not wait.
    """
    answers = Counter(exchange.status for exchange in seen if exchange.status != LOST)
    n_unseen = sum(exchange.status == LOST for exchange in seen)
    by_code: Counter[int] = Counter()
    for entry, n in counted.items():
        by_code[entry.code] += n
    wrong = []
    for code in sorted({*by_code, *answers}):
        excess = by_code[code] - answers[code]
        if excess < 0 or (excess and code not in unseen_codes):
            wrong.append(f"code {code}: the server counted {by_code[code]}, its callers saw {answers[code]}")
    if by_code.total() != len(seen):
        sent = f"{len(seen)} were sent, of which {n_unseen} did not wait or got no answer"
        wrong.append(f"the server counted {by_code.total()} requests, {sent}")
    return wrong + _compare_variants(counted, seen, n_unseen)


def _compare_variants(counted: Book, seen: Sequence[Exchange], n_unseen: int) -> list[str]:
    """Compare the answers with 200, whose callers know what ran; those who did not wait may account for the rest."""
    own = {(entry.policy, entry.r): n for entry, n in counted.items() if entry.code == 200}
    ran = [read_ran(exchange.body) for exchange in seen if exchange.status == 200]
    answers = Counter((one.policy, one.r) for one in ran if one is not None)
    n_unknown = ran.count(None) + n_unseen
    excess = {key: own.get(key, 0) - answers[key] for key in {*own, *answers}}
    wrong = [
        f"policy {policy!r} r {r!r}: the server counted {own.get((policy, r), 0)}, its callers saw {answers[policy, r]}"
        for (policy, r), more in sorted(excess.items())
        if more < 0 or more > n_unknown
    ]
    if not wrong and sum(excess.values()) > n_unknown:
        wrong.append(f"by variant the server counted {sum(excess.values())} answers more than its callers saw")
    return wrong
