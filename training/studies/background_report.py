"""Report of the background study: a table, a plot, and pictures of the tokens over their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.evaluate.table import error_bars
from training.merging.policies import find_policy
from training.studies.patches import FIGURES, BackgroundRow, Estimate

_PERCENT = ("digit_alone", "background_alone", "purity")
_HEADINGS = {
    "digit_alone": "digit patches unmerged %",
    "background_alone": "background patches unmerged %",
    "digit_group": "digit token size",
    "background_group": "background token size",
    "purity": "purity %",
}


def markdown(rows: Sequence[BackgroundRow], n_images: int) -> str:
    """Render the rows as a Markdown table with a note on its columns."""
    lines = [
        "| policy | r | " + " | ".join(_HEADINGS.values()) + " |",
        "|---|---:|" + "---:|" * len(_HEADINGS),
    ]
    for row in sorted(rows, key=lambda row: row.r):
        policy = f"{row.policy} minus {row.base}" if row.base else row.policy
        cells = [_cell(name, row.figures[name], is_difference=row.base is not None) for name in _HEADINGS]
        lines.append(f"| {policy} | {row.r} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Means over {n_images} images with 95 % bootstrap intervals; differences are paired. "
        + "; ".join(f"{_HEADINGS[name]}: {meaning}" for name, meaning in FIGURES.items())
        + ". A digit patch is one of which at least an eighth is ink; all others are background.",
    ]
    return "\n".join(lines) + "\n"


def _cell(name: str, value: Estimate, *, is_difference: bool) -> str:
    scale = 100 if name in _PERCENT else 1
    sign = "+" if is_difference else ""
    low, high = (f"{scale * bound:{sign}.1f}" for bound in value.ci95)
    return f"{scale * value.mean:{sign}.1f} ({low} … {high})"


def plot(rows: Sequence[BackgroundRow], file: Path, title: str) -> None:
    """Plot each figure against r: solid lines for the digit's patches, dashed for the background's."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    alone, group, purity = figure.subplots(1, 3)
    for policy in dict.fromkeys(row.policy for row in rows):
        line = sorted((row for row in rows if row.policy == policy and row.base is None), key=lambda row: row.r)
        for axes, name in ((alone, "alone"), (group, "group")):
            _draw_line(axes, line, f"digit_{name}", f"{policy}, digit", "-")
            _draw_line(axes, line, f"background_{name}", f"{policy}, background", "--")
        _draw_line(purity, line, "purity", policy, "-")
    alone.set(title="patches that stay unmerged", ylabel="% of digit or background patches", ylim=(-3, 103))
    group.set(title="size of the token that holds a patch", ylabel="patches, mean", yscale="log")
    group.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    group.minorticks_off()
    purity.set(title="digit tokens without background", ylabel="% of tokens with digit patches", ylim=(-3, 103))
    for axes in (alone, group, purity):
        axes.set_xlabel("r")
        axes.set_xticks(sorted({row.r for row in rows}))
        axes.grid(alpha=0.3)
    figure.legend(*alone.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=130)


def _draw_line(axes: Any, line: Sequence[BackgroundRow], name: str, label: str, style: str) -> None:
    scale = 100 if name in _PERCENT else 1
    values = [row.figures[name] for row in line]
    axes.errorbar(
        [row.r for row in line],
        [scale * value.mean for value in values],
        yerr=error_bars(
            [scale * value.mean for value in values],
            [(scale * value.ci95[0], scale * value.ci95[1]) for value in values],
        ),
        color=find_policy(line[0].policy).colour,
        linestyle=style,
        marker="o",
        markersize=3,
        capsize=2,
        label=label,
    )


@dataclass(frozen=True)
class MergedImage:
    """An image with the token of each patch, by policy.

    Shapes: image uint8 (S, S, 3); mask (S, S); token_of_patch (patches,) each
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    token_of_patch: dict[str, NDArray[np.int64]]


def picture(images: Sequence[MergedImage], file: Path, r: int) -> None:
    """Draw one row per image: the image, then each policy's tokens in colours and outlines.

    An unmerged patch keeps the colours of the image. The digit's outline is white.
    """
    policies = list(images[0].token_of_patch)
    n_columns = 1 + len(policies)
    figure = Figure(figsize=(2.6 * n_columns, 2.6 * len(images) + 0.5), layout="constrained")
    panels = figure.subplots(len(images), n_columns, squeeze=False)
    for row, (line, merged) in enumerate(zip(panels, images, strict=True)):
        for axes, policy in zip(line, [None, *policies], strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            if policy is None:
                axes.imshow(merged.image, extent=_extent(merged.image))
            else:
                _draw_tokens(axes, merged, merged.token_of_patch[policy])
            if row == 0:
                axes.set_title(f"{policy}, r = {r}" if policy else "image", fontsize=11)
    figure.savefig(file, dpi=110)


def _draw_tokens(axes: Any, merged: MergedImage, token: NDArray[np.int64]) -> None:
    side = len(merged.image)
    cells = round(len(token) ** 0.5)
    pixels = side // cells
    grid = token.reshape(cells, cells)
    tinted = merged.image / 255
    numbers, counts = np.unique(token, return_counts=True)
    shared = numbers[np.argsort(-counts, kind="stable")][: int((counts > 1).sum())]
    for index, number in enumerate(shared):
        where = np.kron(grid == number, np.ones((pixels, pixels), bool))
        grey = merged.image[where].mean(1, keepdims=True) / 255
        tinted[where] = 0.35 * grey + 0.65 * np.array(_colour(index))
    axes.imshow(tinted.clip(0, 1), extent=_extent(merged.image))
    _outline(axes, grid, pixels)
    centres = np.arange(side) + 0.5
    for colour, linewidth in (("black", 3.0), ("white", 1.6)):
        axes.contour(centres, centres, merged.mask, [0.5], colors=colour, linewidths=linewidth)


def _colour(index: int) -> tuple[float, float, float]:
    """Return one of twenty colours, strong ones first, repeating."""
    colours: tuple[float, float, float] = colormaps["tab20"]((2 * index) % 20 + (2 * index // 20) % 2)[:3]
    return colours


def _outline(axes: Any, grid: NDArray[np.int64], pixels: int) -> None:
    """Draw a line between neighbouring patches of different tokens."""
    cells = len(grid)
    for row, column in np.ndindex(cells, cells):
        x, y = column * pixels, row * pixels
        if column + 1 < cells and grid[row, column] != grid[row, column + 1]:
            axes.plot([x + pixels] * 2, [y, y + pixels], color="black", linewidth=0.9)
        if row + 1 < cells and grid[row, column] != grid[row + 1, column]:
            axes.plot([x, x + pixels], [y + pixels] * 2, color="black", linewidth=0.9)


def _extent(image: NDArray[np.uint8]) -> tuple[float, float, float, float]:
    return (0, image.shape[1], image.shape[0], 0)
