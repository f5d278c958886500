"""Expressions: the PromQL that the panels share.

Grafana fills in variables: its own `$__rate_interval` (at least four scrapes), and our `$model`, `$policy` and `$r`.
"""

MODEL = 'model=~"$model"'
POLICY = f'{MODEL}, policy=~"$policy"'
VARIANT = f'{POLICY}, r=~"$r"'
SERVICE = 'job="dtem-serve"'
STAGE = "dtem_stage_seconds"
BY_VARIANT = "policy, r"
VARIANT_NAME = "{{policy}} {{r}}"


def per_second(counter: str, by: str = "", where: str = VARIANT) -> str:
    """Ask how fast a counter grows, over all instances. by: the labels that are kept, with commas between."""
    selector = f"{counter}{{{where}}}" if where else counter
    return f"sum{_by(by)}(rate({selector}[$__rate_interval]))"


def named(expr: str) -> str:
    """Give the policies that choose for each image, whose r is empty, a name for it."""
    return f'label_replace({expr}, "r", "adapts", "r", "")'


def quantile(share: float, histogram: str, by: str, where: str = VARIANT) -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {per_second(f'{histogram}_bucket', labels, where)})"


def mean(histogram: str, by: str) -> str:
    return f"{per_second(f'{histogram}_sum', by)} / ({per_second(f'{histogram}_count', by)} > 0)"


def share(part: str, whole: str) -> str:
    """Ask for a part of a whole; nothing if the whole is 0."""
    return f"{part} / ({whole} > 0)"


def or_none(expr: str, label: str) -> str:
    """Ask for what is above 0, and if nothing is, for 0 with this label `none`: a panel that is empty says so."""
    return f'({expr} > 0) or on () label_replace(vector(0), "{label}", "none", "", "")'


def or_zero_of_images(expr: str, by: str, where: str) -> str:
    """Ask for gauges that are there only while they are above 0, and for 0 of whatever else has run."""
    return f"{expr} or 0 * sum by ({by}) (dtem_images_total{{{where}}})"


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""
