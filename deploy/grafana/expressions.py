"""Expressions: the PromQL that panels share.

Grafana substitutes `$__rate_interval` (at least four scrapes) and the variables `$model`, `$policy` and `$r`.
"""

MODEL = 'model=~"$model"'
POLICY = f'{MODEL}, policy=~"$policy"'
VARIANT = f'{POLICY}, r=~"$r"'
SERVICE = 'job="dtem-serve"'
STAGE = "dtem_stage_seconds"
BY_VARIANT = "policy, r"
VARIANT_LEGEND = "{{policy}} {{r}}"


def per_second(counter: str, by: str = "", where: str = VARIANT) -> str:
    """Return a counter's rate, summed over all instances. by: the labels to keep, separated by commas."""
    selector = f"{counter}{{{where}}}" if where else counter
    return f"sum{_by(by)}(rate({selector}[$__rate_interval]))"


def name_adaptive(expr: str) -> str:
    """Relabel adaptive policies, whose r is empty, as `adapts`."""
    return f'label_replace({expr}, "r", "adapts", "r", "")'


def quantile(q: float, histogram: str, by: str, where: str = VARIANT) -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {per_second(f'{histogram}_bucket', labels, where)})"


def mean(histogram: str, by: str) -> str:
    return f"{per_second(f'{histogram}_sum', by)} / ({per_second(f'{histogram}_count', by)} > 0)"


def ratio(part: str, whole: str) -> str:
    """Divide two expressions; no result where the whole is 0."""
    return f"{part} / ({whole} > 0)"


def or_none(expr: str, label: str) -> str:
    """Keep the series above 0; without any, return 0 labelled `none`, so that the panel is not empty."""
    return f'({expr} > 0) or on () label_replace(vector(0), "{label}", "none", "", "")'


def or_zero_of_images(expr: str, by: str, where: str) -> str:
    """Add 0 for every label set that has served images: these gauges exist only while they are above 0."""
    return f"{expr} or 0 * sum by ({by}) (dtem_images_total{{{where}}})"


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""
