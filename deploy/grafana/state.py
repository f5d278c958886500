"""Panels about the service's own state: its queue, what it refuses, its process and its GPU."""

from collections.abc import Sequence
from typing import Any

from deploy.grafana.expressions import (
    BY_VARIANT,
    MODEL,
    SERVICE,
    STAGE,
    VARIANT,
    VARIANT_NAME,
    mean,
    named,
    or_none,
    or_zero_of_images,
    per_second,
    quantile,
)
from deploy.grafana.panels import ORANGE, RED, Query, buckets, figure, graph

NO_ROOM = "queue_full|deadline_unmeetable"  # 429
FAULTS = "inference_failed|internal_error|engine_stalled|not_ready"  # 500, or 503 without a drain
OUR_REASONS = f"{NO_ROOM}|{FAULTS}|deadline_passed|shutting_down"


def queueing() -> Sequence[Any]:
    return [
        buckets(
            "How large are the batches?",
            "Images that ran together: the darker, the more runs. All at 1: no load. All at DTEM_MAX_BATCH_IMAGES: "
            "the device is full.",
            "suffix:images",
            Query(f"sum by (le) (increase(dtem_batch_images_bucket{{{VARIANT}}}[$__rate_interval]))", "{{le}}"),
        ),
        graph(
            "Batch size, mean",
            "Of each variant. Many variants at once make small batches: only images of one variant run together.",
            "suffix:images",
            Query(named(mean("dtem_batch_images", BY_VARIANT)), VARIANT_NAME),
        ),
        graph(
            "How many lanes are busy?",
            "Seconds of running per second, stacked by variant. Up to DTEM_MAX_CONCURRENT_BATCHES (2) an instance; there all the "
            "time: no room for more.",
            "suffix:lanes",
            Query(named(per_second("dtem_busy_seconds_total", BY_VARIANT)), VARIANT_NAME),
            is_stacked=True,
        ),
        graph(
            "How many images wait?",
            "By the variant that they prefer, at the moment of a scrape. Short peaks are good: they make batches. "
            "DTEM_MAX_QUEUE_IMAGES (64) of one variant: refusals begin.",
            "suffix:images",
            Query(
                named(
                    or_zero_of_images(
                        f"sum by ({BY_VARIANT}) (dtem_queue_depth_images{{{VARIANT}}})", BY_VARIANT, VARIANT
                    )
                ),
                VARIANT_NAME,
            ),
        ),
        graph(
            "How many images are inside?",
            "Decoding, queued or running, of each instance. At DTEM_MAX_IN_FLIGHT_IMAGES (256) requests are refused.",
            "suffix:images",
            Query("dtem_in_flight_images", "{{instance}}"),
            steps=[(256, RED)],
        ),
        graph(
            "How long do images wait? p95",
            "95 of 100 images waited at most this for the device. Above DTEM_TARGET_LATENCY_MS (250 ms) those who consent "
            "are degraded.",
            "s",
            Query(named(quantile(0.95, STAGE, BY_VARIANT, f'{VARIANT}, stage="queue"')), VARIANT_NAME),
            steps=[(0.25, RED)],
        ),
    ]


def refusals() -> Sequence[Any]:
    refused = "dtem_refusals_total"
    return [
        graph(
            "What do we refuse, and why?",
            "Requests and files refused for our reasons: load, deadlines, drain, failures. Good is nothing. "
            "queue_full and "
            "deadline_unmeetable: too much load; inference_failed and internal_error: read the log.",
            "suffix:refusals/s",
            Query(or_none(per_second(refused, "reason", f'reason=~"{OUR_REASONS}"'), "reason"), "{{reason}}"),
            is_stacked=True,
            width=12,
        ),
        graph(
            "Which mistakes do callers make?",
            "Requests and files refused for the callers' reasons. A new one after a release of theirs: tell them; "
            "the answers say why.",
            "suffix:refusals/s",
            Query(
                or_none(per_second(refused, "reason", f'reason!~"{OUR_REASONS}|client_gone"'), "reason"), "{{reason}}"
            ),
            is_stacked=True,
            width=12,
        ),
        graph(
            "How many images run cheaper than asked?",
            "Share of the images degraded with their callers' consent, by the policy that ran. Good is 0; above 10 % "
            "for a quarter "
            "of an hour an alert follows: add an instance.",
            "percentunit",
            Query(
                f"({per_second('dtem_degraded_total', 'policy')} or 0 * {per_second('dtem_images_total', 'policy')})"
                f" / ({per_second('dtem_images_total', 'policy')} > 0)",
                "{{policy}}",
            ),
            steps=[(0.1, ORANGE)],
        ),
        graph(
            "Which deadlines are missed?",
            "deadline_unmeetable: refused at once with 429, which costs nothing. deadline_passed: let in and "
            "answered with 504; "
            "if many, the estimates are wrong or the CPU is taken by others.",
            "suffix:requests/s",
            Query(per_second("dtem_deadline_misses_total", "reason", ""), "{{reason}}"),
        ),
        graph(
            "How many callers leave?",
            "Images whose caller left while they waited (costs nothing) or ran (work in vain). Many: the callers' "
            "time limits are "
            "shorter than the latency; let them send deadline_ms.",
            "suffix:images/s",
            Query(per_second("dtem_cancelled_total", "reason", ""), "{{reason}}"),
        ),
    ]


def process() -> Sequence[Any]:
    return [
        figure(
            "Which models are served?",
            "Model, version, format and device, and how many instances serve it. Two versions at once: both are "
            "still published.",
            "suffix:instances",
            Query(
                f"sum by (model, version, format, device) (dtem_model_info{{{MODEL}}})",
                "{{model}} {{version}}, {{format}} on {{device}}",
            ),
            width=8,
            shows_name=True,
        ),
        figure(
            "Versions since the start",
            "Model versions taken, dropped and refused, by all instances since they started. Refused: the log says "
            "which file, and why.",
            "none",
            Query("sum by (result) (dtem_reloads_total)", "{{result}}"),
            width=8,
            shows_name=True,
        ),
        figure(
            "Time since the start",
            "Of each instance. Short, and you have not deployed: it was restarted; see Restarting in the runbook.",
            "dtdurations",
            Query(f"time() - process_start_time_seconds{{{SERVICE}}}", "{{instance}}"),
            width=8,
            shows_name=True,
        ),
        graph(
            "Memory",
            "Resident memory of each instance; the figure above compares it with the limit. It grows with each version "
            "served and settles; growth without end is a leak.",
            "bytes",
            Query(f"process_resident_memory_bytes{{{SERVICE}}}", "{{instance}}"),
            width=6,
        ),
        graph(
            "CPU",
            "Cores that each instance uses. Near the cores that it has while few lanes are busy: decoding takes them.",
            "suffix:cores",
            Query(f"rate(process_cpu_seconds_total{{{SERVICE}}}[$__rate_interval])", "{{instance}}"),
            width=6,
        ),
        graph(
            "Open files",
            "Open file descriptors of each instance: about one a connection. Growth without end: callers who never "
            "close.",
            "none",
            Query(f"process_open_fds{{{SERVICE}}}", "{{instance}}"),
            width=6,
        ),
        graph(
            "Garbage collections",
            "Python's, by generation. Generation 2 stops the process for milliseconds; more than one a second is "
            "worth a look.",
            "suffix:runs/s",
            Query(
                f"sum by (generation) (rate(python_gc_collections_total{{{SERVICE}}}[$__rate_interval]))",
                "generation {{generation}}",
            ),
            width=6,
        ),
    ]


def gpu() -> Sequence[Any]:
    name = "GPU {{gpu}}"
    return [
        graph(
            "GPU use",
            "Share of the time in which something ran. Low with a long queue: batches are too small, or the CPU "
            "decodes too slowly.",
            "percent",
            Query("DCGM_FI_DEV_GPU_UTIL", name),
            most=100,
            width=6,
        ),
        graph(
            "GPU memory",
            "Used, of each GPU. It settles after the first batches of each size; graphs of more rates need more.",
            "bytes",
            Query("DCGM_FI_DEV_FB_USED * 1048576", name),
            width=6,
        ),
        graph(
            "GPU power",
            "Drawn now. At its limit the clock falls.",
            "watt",
            Query("DCGM_FI_DEV_POWER_USAGE", name),
            width=6,
        ),
        graph(
            "GPU temperature",
            "Above about 85 °C most GPUs slow down: look at the cooling.",
            "celsius",
            Query("DCGM_FI_DEV_GPU_TEMP", name),
            steps=[(85, RED)],
            width=6,
        ),
    ]
