"""Panels about the traffic: what is asked for, what is answered, how fast, and at which rates."""

from collections.abc import Sequence
from typing import Any

from deploy.grafana.expressions import (
    BY_VARIANT,
    MODEL,
    POLICY,
    SERVICE,
    STAGE,
    VARIANT,
    VARIANT_NAME,
    mean,
    named,
    or_zero_of_images,
    per_second,
    quantile,
    share,
)
from deploy.grafana.panels import GREEN, ORANGE, RED, Query, figure, graph


def glance() -> Sequence[Any]:
    requests, all_requests = (per_second("dtem_requests_total", where=where) for where in (MODEL, ""))
    failed, refused = (per_second("dtem_requests_total", where=f'code=~"{codes}"') for codes in ("500|503", "429"))
    saved, taken = per_second("dtem_gmacs_saved_total"), per_second("dtem_gmacs_total")
    memory = f"max(process_resident_memory_bytes{{{SERVICE}}} / dtem_memory_limit_bytes)"
    return [
        figure(
            "Ready?",
            "Whether every instance takes requests. No: see NotReady and Down in the runbook.",
            "none",
            Query(f"min(dtem_ready or up{{{SERVICE}}}) or vector(0)", "ready"),
            words={"0": ("no", RED), "1": ("yes", GREEN)},
        ),
        figure(
            "Alerts firing",
            "Good is 0. Otherwise Prometheus' page Alerts names them, and docs/runbook.md has a heading for each.",
            "none",
            Query('count(ALERTS{alertstate="firing"}) or vector(0)', "alerts"),
            steps=[(1, RED)],
        ),
        figure(
            "Requests",
            "All requests to classify, whatever became of them. A sudden 0 is the callers' or the network's.",
            "reqps",
            Query(f"{requests} or vector(0)", "requests"),
        ),
        figure(
            "Latency, p99",
            "99 of 100 answered requests were faster. Good is below what callers wait; beyond 1 s an alert follows. "
            "See Latency.",
            "s",
            Query(quantile(0.99, STAGE, "", f'{VARIANT}, stage="total"'), "p99"),
            steps=[(0.5, ORANGE), (1, RED)],
        ),
        figure(
            "Failed",
            "Answered with 500 or 503, of all requests, of all models. Good is 0. "
            "Otherwise: read the log, and Failing in the runbook.",
            "percentunit",
            Query(f"{share(failed, all_requests)} or vector(0)", "failed"),
            steps=[(0.001, ORANGE), (0.01, RED)],
        ),
        figure(
            "Refused",
            "Answered with 429, of all requests, of all models: no room, or no time. Above 5 % for long: add an "
            "instance, or agree on a higher r.",
            "percentunit",
            Query(f"{share(refused, all_requests)} or vector(0)", "429"),
            steps=[(0.01, ORANGE), (0.05, RED)],
        ),
        figure(
            "GMACs saved",
            "Share of the compute of the unmerged model that merging saved. The callers choose it, by r.",
            "percentunit",
            Query(share(saved, f"({saved} + {taken})"), "saved"),
        ),
        figure(
            "Memory used",
            "The fullest instance's share of what its container (else the machine) may have. Above 90 % it may be "
            "killed.",
            "percentunit",
            Query(memory, "memory"),
            steps=[(0.75, ORANGE), (0.9, RED)],
        ),
    ]


def latency() -> Sequence[Any]:
    total = f'{VARIANT}, stage="total"'
    return [
        graph(
            f"How long does a request take, by rate? p{percent}",
            f"{percent} of 100 answered requests took at most this, from the whole body to the answer. Higher r "
            "should be faster; "
            "if all rise together the queue is long (Batches and queue), if one does its graph is slow.",
            "s",
            Query(named(quantile(percent / 100, STAGE, BY_VARIANT, total)), VARIANT_NAME),
            steps=[(1, RED)] if percent == 99 else [],
        )
        for percent in (50, 95, 99)
    ] + [
        graph(
            f"Where does the time go? p{percent}",
            "Per image: decode (CPU), queue (waits for the device), inference (the run of its batch); total is the "
            "whole request. "
            "Queue above inference: too much load. Decode above inference: large images, or DTEM_N_DECODE_THREADS is "
            "low.",
            "s",
            Query(quantile(percent / 100, STAGE, "stage"), "{{stage}}"),
        )
        for percent in (50, 95, 99)
    ]


def throughput() -> Sequence[Any]:
    return [
        graph(
            "How many images, of which variant?",
            "Images classified, stacked: policy and rate that ran. The top is the throughput; compare it with "
            "docs/results/serve.md.",
            "suffix:images/s",
            Query(named(per_second("dtem_images_total", BY_VARIANT)), VARIANT_NAME),
            is_stacked=True,
            width=12,
        ),
        graph(
            "How were requests answered?",
            "By HTTP status, stacked. 2xx is good; 4xx the callers' mistakes, but 429 means refused for load; 5xx: "
            "see Refusals.",
            "reqps",
            Query(per_second("dtem_requests_total", "code", MODEL), "{{code}}"),
            is_stacked=True,
            width=12,
            colours={"2..": GREEN, "4..": ORANGE, "429": "yellow", "5..": RED},
        ),
    ]


def rates() -> Sequence[Any]:
    images = per_second("dtem_images_total", BY_VARIANT)
    whole = per_second("dtem_images_total")
    saved, taken = (per_second(name, "policy") for name in ("dtem_gmacs_saved_total", "dtem_gmacs_total"))
    return [
        graph(
            "Which rates are chosen?",
            "Share of the images by policy and rate that ran, stacked to 100 %. More of the high rates at the same "
            "callers: "
            "the service degrades those who consent.",
            "percentunit",
            Query(named(f"{images} / ignoring({BY_VARIANT}) group_left () ({whole} > 0)"), VARIANT_NAME),
            is_stacked=True,
            most=1,
        ),
        graph(
            "How many tokens are left?",
            "Mean number of tokens that an image has after the last block: the rate in effect, also of policies that "
            "adapt. "
            "Falls under load, as rates rise.",
            "suffix:tokens",
            Query(named(mean("dtem_kept_tokens", BY_VARIANT)), VARIANT_NAME),
        ),
        graph(
            "From which rate on does load push?",
            "Least rate of requests that consent to be degraded. 0 is good: they run at the rate they prefer. "
            "Up for long: add an instance.",
            "none",
            Query(
                or_zero_of_images(f"max by (policy) (dtem_rate_floor{{{POLICY}}})", "policy", POLICY),
                "{{policy}}",
            ),
        ),
        graph(
            "How much compute is taken, and saved?",
            "GMACs a second that images took, and that they would have taken besides, unmerged. Stacked: the top is "
            "the unmerged cost.",
            "si:GMAC/s",
            Query(per_second("dtem_gmacs_total"), "taken"),
            Query(per_second("dtem_gmacs_saved_total"), "saved"),
            is_stacked=True,
            width=12,
        ),
        graph(
            "What share of the compute is saved?",
            "By policy, of the unmerged model's GMACs. It should be what docs/results/policies.md says of the rates chosen; "
            "the policies that adapt save more of easy images.",
            "percentunit",
            Query(f"{saved} / ({saved} + {taken} > 0)", "{{policy}}"),
            most=1,
            width=12,
        ),
    ]
