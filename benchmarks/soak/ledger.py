"""The ledger: requests as the server counted them, compared with what the clients saw."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load.open_loop import LOST, CallResult

REQUESTS = "dtem_requests_total"


@dataclass(frozen=True)
class Account:
    """Labels of the request counter.

    policy and r are empty if no variant was chosen; r is empty for an adaptive policy.
    """

    policy: str
    r: str
    code: int


Ledger = Counter[Account]


@dataclass(frozen=True)
class RanVariant:
    """The variant that an answer reports, with labels as the server counts them."""

    version: str
    policy: str
    r: str


def read_ledger(metrics: str) -> Ledger:
    """Read the request counts of all models from the text of `/metrics`."""
    ledger: Ledger = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == REQUESTS:
                labels = sample.labels
                ledger[Account(labels["policy"], labels["r"], int(labels["code"]))] += int(sample.value)
    return ledger


def read_variant(body: bytes) -> RanVariant | None:
    """Read the variant from an answer with status 200: to one image, to a form, or under /v2.

    For a form, that of its first valid image; None if there is none.
    """
    answer: dict[str, Any] = json.loads(body)
    if "model_version" in answer:
        parameters = answer["parameters"]
        return RanVariant(answer["model_version"], parameters["policy"], _text(parameters.get("r")))
    one = next((item for item in answer.get("results", [answer]) if "predictions" in item), None)
    return None if one is None else RanVariant(one["model"]["version"], one["policy"], _text(one["r"]))


def _text(r: int | None) -> str:
    return "" if r is None else str(r)


def compare_ledgers(counted: Ledger, results: Sequence[CallResult], unseen_codes: frozenset[int]) -> list[str]:
    """List the differences.

    counted: increase of the server's ledger. unseen_codes: codes that the server may have counted
    for clients that disconnected.
    """
    answers = Counter(result.status for result in results if result.status != LOST)
    n_unseen = sum(result.status == LOST for result in results)
    by_code: Counter[int] = Counter()
    for account, n in counted.items():
        by_code[account.code] += n
    differences = []
    for code in sorted({*by_code, *answers}):
        excess = by_code[code] - answers[code]
        if excess < 0 or (excess and code not in unseen_codes):
            differences.append(f"code {code}: the server counted {by_code[code]}, the clients {answers[code]}")
    if by_code.total() != len(results):
        sent = f"the clients sent {len(results)}, of which {n_unseen} got no response"
        differences.append(f"the server counted {by_code.total()} requests, {sent}")
    return differences + _compare_variants(counted, results, n_unseen)


def _compare_variants(counted: Ledger, results: Sequence[CallResult], n_unseen: int) -> list[str]:
    """Compare the answers with status 200 by variant. Clients that disconnected may account for the rest."""
    own = {(account.policy, account.r): n for account, n in counted.items() if account.code == 200}
    variants = [read_variant(result.body) for result in results if result.status == 200]
    answers = Counter((one.policy, one.r) for one in variants if one is not None)
    n_unknown = variants.count(None) + n_unseen
    excess = {key: own.get(key, 0) - answers[key] for key in {*own, *answers}}
    differences = [
        f"policy {policy!r} r {r!r}: the server counted {own.get((policy, r), 0)}, the clients {answers[policy, r]}"
        for (policy, r), more in sorted(excess.items())
        if more < 0 or more > n_unknown
    ]
    if not differences and sum(excess.values()) > n_unknown:
        differences.append(f"by variant, the server counted {sum(excess.values())} answers more than the clients")
    return differences
