"""Traffic: panels of requests, latency, throughput and merging."""

from collections.abc import Sequence

from deploy.grafana.expressions import (
    BY_VARIANT,
    MODEL,
    POLICY,
    SERVICE,
    STAGE,
    VARIANT,
    VARIANT_LEGEND,
    mean,
    name_adaptive,
    or_zero_of_images,
    per_second,
    quantile,
    ratio,
)
from deploy.grafana.panels import GREEN, ORANGE, RED, Panel, Query, stat, timeseries

PERCENTILES = (50, 95, 99)


def overview() -> Sequence[Panel]:
    requests, all_requests = (per_second("dtem_requests_total", where=where) for where in (MODEL, ""))
    failed, refused = (per_second("dtem_requests_total", where=f'code=~"{codes}"') for codes in ("500|503", "429"))
    saved, used = per_second("dtem_gmacs_saved_total"), per_second("dtem_gmacs_total")
    memory = "max(dtem_memory_bytes / dtem_memory_limit_bytes)"
    return [
        stat(
            "Ready",
            "Whether every instance is ready. If not, see DtemServeNotReady and DtemServeDown in the runbook.",
            "none",
            Query(f"min(dtem_ready or up{{{SERVICE}}}) or vector(0)", "ready"),
            value_texts={"0": ("no", RED), "1": ("yes", GREEN)},
        ),
        stat(
            "Alerts firing",
            "Should be 0. Prometheus lists them on its Alerts page; docs/runbook.md has a section for each.",
            "none",
            Query('count(ALERTS{alertstate="firing"}) or vector(0)', "alerts"),
            thresholds=[(1, RED)],
            may_be_zero=True,
        ),
        stat(
            "Request rate",
            "Inference requests with any status. A sudden drop to 0 points to the clients or the network.",
            "reqps",
            Query(f"{requests} or vector(0)", "requests"),
        ),
        stat(
            "Latency p99",
            "99 % of the answered requests were faster. Above 1 s an alert fires. Details: row Latency.",
            "s",
            Query(quantile(0.99, STAGE, "", f'{VARIANT}, stage="total"'), "p99"),
            thresholds=[(0.5, ORANGE), (1, RED)],
        ),
        stat(
            "Failed requests",
            "Share of requests answered with 500 or 503, over all models. Should be 0. Otherwise read the log, and "
            "DtemServeFailing in the runbook.",
            "percentunit",
            Query(f"{ratio(failed, all_requests)} or vector(0)", "failed"),
            thresholds=[(0.001, ORANGE), (0.01, RED)],
            may_be_zero=True,
        ),
        stat(
            "Refused requests",
            "Share of requests answered with 429, over all models: the queue is full or the deadline cannot be met. "
            "If it stays above 5 %, add an instance or use a higher r.",
            "percentunit",
            Query(f"{ratio(refused, all_requests)} or vector(0)", "429"),
            thresholds=[(0.01, ORANGE), (0.05, RED)],
        ),
        stat(
            "Compute saved",
            "Share of the unmerged model's GMACs that token merging saved. Clients control it through r.",
            "percentunit",
            Query(ratio(saved, f"({saved} + {used})"), "saved"),
        ),
        stat(
            "Memory used",
            "Highest share of the memory limit (container's, else machine's) over all instances. Above 90 % the kernel "
            "may kill the process.",
            "percentunit",
            Query(memory, "memory"),
            thresholds=[(0.75, ORANGE), (0.9, RED)],
        ),
    ]


def latency() -> Sequence[Panel]:
    total = f'{VARIANT}, stage="total"'
    return [
        timeseries(
            f"Latency p{percent} by r",
            f"{percent} % of the answered requests were faster, from the complete body to the answer. A higher "
            "r should be faster. If all rates rise together, the queue is long (row Batches and queue); if one rises, "
            "its graph is slow.",
            "s",
            Query(name_adaptive(quantile(percent / 100, STAGE, BY_VARIANT, total)), VARIANT_LEGEND),
            thresholds=[(1, RED)] if percent == 99 else [],
        )
        for percent in PERCENTILES
    ] + [
        timeseries(
            f"Latency p{percent} by stage",
            "Per image: decode (CPU), queue (wait for a decoder thread and the device), inference (its batch). "
            "Per request: total. Queue above inference: overload. Decode above inference: large images, or too few "
            "DTEM_N_DECODE_THREADS.",
            "s",
            Query(quantile(percent / 100, STAGE, "stage"), "{{stage}}"),
        )
        for percent in PERCENTILES
    ]


def throughput() -> Sequence[Panel]:
    return [
        timeseries(
            "Throughput by variant",
            "Images classified per second, stacked by the policy and r that ran. Compare the sum with "
            "docs/results/overhead.md.",
            "suffix:images/s",
            Query(name_adaptive(per_second("dtem_images_total", BY_VARIANT)), VARIANT_LEGEND),
            is_stacked=True,
            width=12,
        ),
        timeseries(
            "Requests by status code",
            "Stacked. 2xx: answered. 429: refused for load. Other 4xx: client errors. 5xx: see row Refusals and "
            "degradation.",
            "reqps",
            Query(per_second("dtem_requests_total", "code", MODEL), "{{code}}"),
            is_stacked=True,
            width=12,
            colours={"2..": GREEN, "4..": ORANGE, "429": "yellow", "5..": RED},
        ),
    ]


def merging() -> Sequence[Panel]:
    images = per_second("dtem_images_total", BY_VARIANT)
    all_images = per_second("dtem_images_total")
    saved, used = (per_second(name, "policy") for name in ("dtem_gmacs_saved_total", "dtem_gmacs_total"))
    return [
        timeseries(
            "Share of images by variant",
            "By the policy and r that ran, stacked to 100 %. If high rates grow with the same clients, the service is "
            "degrading requests that opted in.",
            "percentunit",
            Query(name_adaptive(f"{images} / ignoring({BY_VARIANT}) group_left () ({all_images} > 0)"), VARIANT_LEGEND),
            is_stacked=True,
            axis_max=1,
        ),
        timeseries(
            "Mean tokens kept by variant",
            "Tokens per image after the last block. For adaptive policies this is the effective rate. It falls under "
            "load, when rates rise.",
            "suffix:tokens",
            Query(name_adaptive(mean("dtem_kept_tokens", BY_VARIANT)), VARIANT_LEGEND),
        ),
        timeseries(
            "Rate floor by policy",
            "Minimum r of requests that opted in to degradation. 0: they run at their preferred r. If it stays up, add "
            "an instance.",
            "none",
            Query(
                or_zero_of_images(f"max by (policy) (dtem_rate_floor{{{POLICY}}})", "policy", POLICY),
                "{{policy}}",
            ),
            may_be_zero=True,
        ),
        timeseries(
            "Compute used and saved",
            "GMACs per second, stacked. The sum is the cost of the unmerged model.",
            "si:GMAC/s",
            Query(per_second("dtem_gmacs_total"), "used"),
            Query(per_second("dtem_gmacs_saved_total"), "saved"),
            is_stacked=True,
            width=12,
        ),
        timeseries(
            "Compute saved by policy",
            "Share of the unmerged model's GMACs. Expect the values of docs/results/policies.md for the rates in use; "
            "adaptive policies save more on easy images.",
            "percentunit",
            Query(f"{saved} / ({saved} + {used} > 0)", "{{policy}}"),
            axis_max=1,
            width=12,
        ),
    ]
