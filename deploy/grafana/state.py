"""State: panels of the queue, refusals, the process and the GPU."""

from collections.abc import Sequence

from deploy.grafana.expressions import (
    BY_VARIANT,
    MODEL,
    SERVICE,
    STAGE,
    VARIANT,
    VARIANT_LEGEND,
    mean,
    name_adaptive,
    or_none,
    or_zero_of_images,
    per_second,
    quantile,
)
from deploy.grafana.panels import ORANGE, RED, Panel, Query, heatmap, stat, timeseries

# Answered with 429.
OVERLOAD = "queue_full|deadline_unmeetable"
# Answered with 500, or with 503 outside a drain.
FAULTS = "inference_failed|internal_error|engine_stalled|not_ready"
SERVICE_REASONS = f"{OVERLOAD}|{FAULTS}|deadline_passed|shutting_down"


def queueing() -> Sequence[Panel]:
    depth = f"sum by ({BY_VARIANT}) (dtem_queue_depth_images{{{VARIANT}}})"
    return [
        heatmap(
            "Batch size distribution",
            "Images per batch; darker means more batches. All at 1: low load. All at DTEM_MAX_BATCH_IMAGES: the device "
            "is saturated.",
            "suffix:images",
            Query(f"sum by (le) (increase(dtem_batch_images_bucket{{{VARIANT}}}[$__rate_interval]))", "{{le}}"),
        ),
        timeseries(
            "Mean batch size by variant",
            "A batch holds images of one variant only, so many variants at once make small batches.",
            "suffix:images",
            Query(name_adaptive(mean("dtem_batch_images", BY_VARIANT)), VARIANT_LEGEND),
        ),
        timeseries(
            "Concurrent batches by variant",
            "Mean number of batches running, stacked. The maximum is DTEM_MAX_CONCURRENT_BATCHES (2) per instance; "
            "permanently there means saturated.",
            "suffix:batches",
            Query(name_adaptive(per_second("dtem_busy_seconds_total", BY_VARIANT)), VARIANT_LEGEND),
            is_stacked=True,
        ),
        timeseries(
            "Queue depth by variant",
            "Images waiting for the device at each scrape, by preferred variant. Short peaks are good: they fill "
            "batches. At DTEM_MAX_QUEUE_IMAGES (64) per variant requests are refused.",
            "suffix:images",
            Query(name_adaptive(or_zero_of_images(depth, BY_VARIANT, VARIANT)), VARIANT_LEGEND),
            may_be_zero=True,
        ),
        timeseries(
            "Images in flight by instance",
            "Images decoding, queued or running. At DTEM_MAX_IN_FLIGHT_IMAGES (256) requests are refused.",
            "suffix:images",
            Query("dtem_in_flight_images", "{{instance}}"),
            thresholds=[(256, RED)],
        ),
        timeseries(
            "Queue wait p95 by variant",
            "95 % of the images waited less for a decoder thread and the device. Above DTEM_TARGET_LATENCY_MS "
            "(250 ms) requests that opted in are degraded.",
            "s",
            Query(name_adaptive(quantile(0.95, STAGE, BY_VARIANT, f'{VARIANT}, stage="queue"')), VARIANT_LEGEND),
            thresholds=[(0.25, RED)],
        ),
    ]


def refusals() -> Sequence[Panel]:
    refused = "dtem_refusals_total"
    degraded, images = (per_second(name, "policy") for name in ("dtem_degraded_total", "dtem_images_total"))
    return [
        timeseries(
            "Service refusals by reason",
            "Requests and files refused for overload, deadlines, a drain or a failure. Should be none. queue_full, "
            "deadline_unmeetable: overload. inference_failed, internal_error: read the log.",
            "suffix:refusals/s",
            Query(or_none(per_second(refused, "reason", f'reason=~"{SERVICE_REASONS}"'), "reason"), "{{reason}}"),
            is_stacked=True,
            width=12,
        ),
        timeseries(
            "Client errors by reason",
            "Requests and files refused because they were invalid. A new reason after a client's release: tell its "
            "developers. The answers contain the details.",
            "suffix:refusals/s",
            Query(
                or_none(per_second(refused, "reason", f'reason!~"{SERVICE_REASONS}|client_gone"'), "reason"),
                "{{reason}}",
            ),
            is_stacked=True,
            width=12,
        ),
        timeseries(
            "Degraded images by policy",
            "Share of images that ran at a higher r than preferred; their requests opted in. Should be 0. Above 10 % "
            "for 15 minutes an alert fires: add an instance.",
            "percentunit",
            Query(f"({degraded} or 0 * {images}) / ({images} > 0)", "{{policy}}"),
            thresholds=[(0.1, ORANGE)],
        ),
        timeseries(
            "Missed deadlines by reason",
            "deadline_unmeetable: refused at once with 429, at no cost. deadline_passed: admitted, then answered with "
            "504; if frequent, the latency estimates are too low or other processes use the CPU.",
            "suffix:requests/s",
            Query(per_second("dtem_deadline_misses_total", "reason", ""), "{{reason}}"),
        ),
        timeseries(
            "Cancelled images by state",
            "Images whose client disconnected while they were waiting (no cost) or running (wasted work). If frequent, "
            "client timeouts are shorter than the latency; clients should send deadline_ms.",
            "suffix:images/s",
            Query(per_second("dtem_cancelled_total", "reason", ""), "{{reason}}"),
        ),
    ]


def process() -> Sequence[Panel]:
    return [
        stat(
            "Model versions served",
            "Instances per model, version, format and device. Two versions of a model: both are published.",
            "suffix:instances",
            Query(
                f"sum by (model, version, format, device) (dtem_model_info{{{MODEL}}})",
                "{{model}} {{version}}, {{format}} on {{device}}",
            ),
            width=6,
            shows_name=True,
        ),
        stat(
            "Default model",
            "Instances per model and version of requests that name none, and those whose default DTEM_DEFAULT_MODEL "
            "names. Two models: the instances disagree.",
            "suffix:instances",
            Query("count by (model, version) (dtem_default_model_info)", "{{model}} {{version}}"),
            Query("sum(dtem_default_model_configured)", "configured"),
            width=5,
            shows_name=True,
            may_be_zero=True,
        ),
        stat(
            "Refused versions by model",
            "Bad versions in the store, which are not served. /models and the log have the file and the reason. See "
            "DtemServeVersionRefused in the runbook.",
            "none",
            Query("max by (model) (dtem_refused_versions)", "{{model}}"),
            width=4,
            shows_name=True,
            may_be_zero=True,
        ),
        stat(
            "Model reloads by result",
            "Versions loaded, dropped and refused since the start, over all instances. For refused versions the log "
            "has the file and the reason.",
            "none",
            Query("sum by (result) (dtem_reloads_total)", "{{result}}"),
            width=5,
            shows_name=True,
            may_be_zero=True,
        ),
        stat(
            "Uptime by instance",
            "If short without a deployment, the instance was restarted: see DtemServeRestarting in the runbook.",
            "dtdurations",
            Query(f"time() - process_start_time_seconds{{{SERVICE}}}", "{{instance}}"),
            width=4,
            shows_name=True,
        ),
        timeseries(
            "Memory by instance",
            "Shared pages count once. Each new version adds a step. Continuous growth is a leak. The Overview compares "
            "it with the limit.",
            "bytes",
            Query("dtem_memory_bytes", "{{instance}}"),
            width=6,
        ),
        timeseries(
            "CPU use by instance",
            "Cores in use. Near the limit with few concurrent batches: decoding takes the CPU.",
            "suffix:cores",
            Query(f"rate(process_cpu_seconds_total{{{SERVICE}}}[$__rate_interval])", "{{instance}}"),
            width=6,
        ),
        timeseries(
            "Open file descriptors by instance",
            "About one per connection. Continuous growth: clients that never close connections.",
            "none",
            Query(f"process_open_fds{{{SERVICE}}}", "{{instance}}"),
            width=6,
        ),
        timeseries(
            "Garbage collections by generation",
            "Python's. Generation 2 pauses the process for milliseconds; more than one per second is unusual.",
            "suffix:runs/s",
            Query(
                f"sum by (generation) (rate(python_gc_collections_total{{{SERVICE}}}[$__rate_interval]))",
                "generation {{generation}}",
            ),
            width=6,
        ),
    ]


def gpu() -> Sequence[Panel]:
    name = "GPU {{gpu}}"
    return [
        timeseries(
            "GPU utilization",
            "Share of time with a kernel running. Low with a deep queue: batches are too small, or decoding on the CPU "
            "is too slow.",
            "percent",
            Query("DCGM_FI_DEV_GPU_UTIL", name),
            axis_max=100,
            width=6,
        ),
        timeseries(
            "GPU memory used",
            "Stable after the first batch of each size. Graphs for more rates need more.",
            "bytes",
            Query("DCGM_FI_DEV_FB_USED * 1048576", name),
            width=6,
        ),
        timeseries(
            "GPU power",
            "At the power limit the clock frequency drops.",
            "watt",
            Query("DCGM_FI_DEV_POWER_USAGE", name),
            width=6,
        ),
        timeseries(
            "GPU temperature",
            "Most GPUs throttle above about 85 °C: check the cooling.",
            "celsius",
            Query("DCGM_FI_DEV_GPU_TEMP", name),
            thresholds=[(85, RED)],
            width=6,
        ),
    ]
