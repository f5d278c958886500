"""Panels: Grafana's, by its own builder, with what all of ours have in common. Each says what it shows and what a good
value is, has a unit, and reads Prometheus.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = shapes.DataSourceRef(type_val="prometheus", uid="dtem-prometheus")
HEIGHT = 8
GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"

DECIMALS = {"none": 0, "percentunit": 1, "bytes": 1}  # else Grafana's own choice

Step = tuple[float, str]  # from this value on, this colour
Panel = TypeVar("Panel", timeseries.Panel, stat.Panel, heatmap.Panel)  # they share methods, but no type


class Query(NamedTuple):
    """What is asked of Prometheus, and how its answers are called."""

    expr: str
    legend: str


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    steps: Sequence[Step] = (),
    is_stacked: bool = False,
    most: float | None = None,
    colours: dict[str, str] | None = None,
) -> timeseries.Panel:
    """Make a panel of curves over time.

    steps: thresholds, drawn as dashed lines; most: the end of the axis; colours: of series, by a regular expression.
    """
    panel = timeseries.Panel().line_width(1).fill_opacity(10).show_points(shapes.VisibilityMode.NEVER)
    panel = panel.color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
    panel = panel.min(0).legend(_legend()).tooltip(_tooltip()).height(HEIGHT).span(width)
    if is_stacked:
        panel = panel.fill_opacity(60).stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL).group("A"))
    if steps:
        panel = panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(shapes.GraphThresholdsStyleMode.DASHED))
    if most is not None:
        panel = panel.max(most)
    for regexp, colour in (colours or {}).items():
        fixed = model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})
        panel = panel.override_by_regexp(regexp, [fixed])
    return _describe(panel, title, description, unit, queries, steps)


def figure(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 3,
    steps: Sequence[Step] = (),
    words: dict[str, tuple[str, str]] | None = None,
    shows_name: bool = False,
) -> stat.Panel:
    """Make a panel of the latest value, large; words: text and colour instead of certain values."""
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    panel = stat.Panel().reduce_options(last).graph_mode(shapes.BigValueGraphMode.AREA).height(4).span(width)
    panel = panel.color_mode(shapes.BigValueColorMode.VALUE).no_value("no traffic")
    if shows_name:
        panel = panel.text_mode(shapes.BigValueTextMode.VALUE_AND_NAME).graph_mode(shapes.BigValueGraphMode.NONE)
    if words:
        options = {value: model.ValueMappingResult(text=text, color=colour) for value, (text, colour) in words.items()}
        panel = panel.mappings([model.ValueMap(options=options)]).graph_mode(shapes.BigValueGraphMode.NONE)
    return _describe(panel, title, description, unit, queries, steps)


def buckets(title: str, description: str, unit: str, query: Query, width: int = 8) -> heatmap.Panel:
    """Make a panel of a histogram over time: the darker, the more."""
    colours = heatmap.HeatmapColorOptions().mode(heatmap_model.HeatmapColorMode.SCHEME).scheme("Blues").steps(32)
    panel = heatmap.Panel().calculate(False).color(colours).cell_gap(1).height(HEIGHT).span(width).show_legend()
    panel = panel.y_axis(heatmap.YAxisConfig().axis_placement(shapes.AxisPlacement.LEFT).unit(unit).decimals(0))
    panel = panel.rows_frame(heatmap.RowsHeatmapOptions().layout(shapes.HeatmapCellLayout.LE))
    panel = panel.tooltip(heatmap.HeatmapTooltip().mode(shapes.TooltipDisplayMode.SINGLE).y_histogram(True))
    return _describe(panel, title, description, unit, [query], (), PromQueryFormat.HEATMAP)


def _describe(
    panel: Panel,
    title: str,
    description: str,
    unit: str,
    queries: Sequence[Query],
    steps: Sequence[Step],
    how: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> Panel:
    """Add what every kind of panel has."""
    thresholds = [model.Threshold(value=None, color=GREEN if steps else BLUE)]
    thresholds += [model.Threshold(value=value, color=colour) for value, colour in steps]
    panel = panel.title(title).description(description).unit(unit).datasource(SOURCE)
    panel = panel.thresholds(dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(thresholds))
    if unit in DECIMALS:
        panel = panel.decimals(DECIMALS[unit])
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        asked = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(letter)
        panel = panel.with_target(asked.format(how).range().datasource(SOURCE))
    return panel


def _legend() -> common.VizLegendOptions:
    legend = common.VizLegendOptions().display_mode(shapes.LegendDisplayMode.TABLE).show_legend(True)
    return legend.placement(shapes.LegendPlacement.BOTTOM).calcs(["mean", "lastNotNull"])


def _tooltip() -> common.VizTooltipOptions:
    return common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING)
