"""Panels: Grafana's time series, stat and heatmap, with the options that all of ours share.

Every panel has a title that names what it shows, a description with the good value, a unit, and Prometheus queries.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from grafana_foundation_sdk.builders import common, dashboard, prometheus
from grafana_foundation_sdk.builders import heatmap as heatmap_builder
from grafana_foundation_sdk.builders import stat as stat_builder
from grafana_foundation_sdk.builders import timeseries as timeseries_builder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = shapes.DataSourceRef(type_val="prometheus", uid="dtem-prometheus")
HEIGHT = 8
GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"

# By unit; Grafana chooses for the others.
DECIMALS = {"none": 0, "percentunit": 1, "bytes": 1}

# From this value on, this colour.
Threshold = tuple[float, str]
# The SDK's panel builders share methods, but no base class.
Builder = TypeVar("Builder", timeseries_builder.Panel, stat_builder.Panel, heatmap_builder.Panel)


class Query(NamedTuple):
    """A PromQL expression and the legend of its series."""

    expr: str
    legend: str


class Panel(NamedTuple):
    """A panel and its builder. may_be_zero: whether 0 throughout is normal after traffic; read by the tests."""

    title: str
    builder: timeseries_builder.Panel | stat_builder.Panel | heatmap_builder.Panel
    may_be_zero: bool


class Row(NamedTuple):
    title: str
    panels: Sequence[Panel]
    is_collapsed: bool = False


def timeseries(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    thresholds: Sequence[Threshold] = (),
    is_stacked: bool = False,
    axis_max: float | None = None,
    colours: dict[str, str] | None = None,
    may_be_zero: bool = False,
) -> Panel:
    """Build a time series panel. Thresholds are dashed lines; colours map a regular expression of series names."""
    panel = timeseries_builder.Panel().line_width(1).fill_opacity(10).show_points(shapes.VisibilityMode.NEVER)
    panel = panel.color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
    panel = panel.min(0).legend(_legend()).tooltip(_tooltip()).height(HEIGHT).span(width)
    if is_stacked:
        panel = panel.fill_opacity(60).stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL).group("A"))
    if thresholds:
        panel = panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(shapes.GraphThresholdsStyleMode.DASHED))
    if axis_max is not None:
        panel = panel.max(axis_max)
    for regexp, colour in (colours or {}).items():
        fixed = model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})
        panel = panel.override_by_regexp(regexp, [fixed])
    return Panel(title, _describe(panel, title, description, unit, queries, thresholds), may_be_zero)


def stat(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 3,
    thresholds: Sequence[Threshold] = (),
    value_texts: dict[str, tuple[str, str]] | None = None,
    shows_name: bool = False,
    may_be_zero: bool = False,
) -> Panel:
    """Build a stat panel of the latest value. value_texts map a value to the text and the colour shown instead."""
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    panel = stat_builder.Panel().reduce_options(last).graph_mode(shapes.BigValueGraphMode.AREA).height(4).span(width)
    panel = panel.color_mode(shapes.BigValueColorMode.VALUE).no_value("no traffic")
    if shows_name:
        panel = panel.text_mode(shapes.BigValueTextMode.VALUE_AND_NAME).graph_mode(shapes.BigValueGraphMode.NONE)
    if value_texts:
        options = {
            value: model.ValueMappingResult(text=text, color=colour) for value, (text, colour) in value_texts.items()
        }
        panel = panel.mappings([model.ValueMap(options=options)]).graph_mode(shapes.BigValueGraphMode.NONE)
    return Panel(title, _describe(panel, title, description, unit, queries, thresholds), may_be_zero)


def heatmap(title: str, description: str, unit: str, query: Query, width: int = 8, may_be_zero: bool = False) -> Panel:
    """Build a heatmap panel of a histogram over time."""
    scheme = heatmap_builder.HeatmapColorOptions().mode(heatmap_model.HeatmapColorMode.SCHEME).scheme("Blues")
    panel = (
        heatmap_builder.Panel()
        .calculate(False)
        .color(scheme.steps(32))
        .cell_gap(1)
        .height(HEIGHT)
        .span(width)
        .show_legend()
    )
    axis = heatmap_builder.YAxisConfig().axis_placement(shapes.AxisPlacement.LEFT).unit(unit).decimals(0)
    panel = panel.y_axis(axis).rows_frame(heatmap_builder.RowsHeatmapOptions().layout(shapes.HeatmapCellLayout.LE))
    tooltip = heatmap_builder.HeatmapTooltip().mode(shapes.TooltipDisplayMode.SINGLE).y_histogram(True)
    panel = _describe(panel.tooltip(tooltip), title, description, unit, [query], (), PromQueryFormat.HEATMAP)
    return Panel(title, panel, may_be_zero)


def _describe(
    panel: Builder,
    title: str,
    description: str,
    unit: str,
    queries: Sequence[Query],
    thresholds: Sequence[Threshold],
    query_format: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> Builder:
    """Set the options that every kind of panel has."""
    steps = [model.Threshold(value=None, color=GREEN if thresholds else BLUE)]
    steps += [model.Threshold(value=value, color=colour) for value, colour in thresholds]
    panel = panel.title(title).description(description).unit(unit).datasource(SOURCE)
    panel = panel.thresholds(dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
    if unit in DECIMALS:
        panel = panel.decimals(DECIMALS[unit])
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(letter)
        panel = panel.with_target(target.format(query_format).range().datasource(SOURCE))
    return panel


def _legend() -> common.VizLegendOptions:
    legend = common.VizLegendOptions().display_mode(shapes.LegendDisplayMode.TABLE).show_legend(True)
    return legend.placement(shapes.LegendPlacement.BOTTOM).calcs(["mean", "lastNotNull"])


def _tooltip() -> common.VizTooltipOptions:
    return common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING)
