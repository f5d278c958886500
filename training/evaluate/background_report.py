"""Lay out what merged with the background: a table, a plot, and pictures of the tokens over their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.evaluate.background import FIGURES, BackgroundRow, Estimate
from training.evaluate.table import COLOURS, error_bars

_PERCENT = ("digit_alone", "background_alone", "purity")
_HEADINGS = {
    "digit_alone": "digit alone %",
    "background_alone": "background alone %",
    "digit_group": "digit's group",
    "background_group": "background's group",
    "purity": "purity %",
}


def markdown(rows: Sequence[BackgroundRow], n_images: int) -> str:
    """Lay the rows out as a Markdown table, and say what the columns mean."""
    lines = [
        "| policy | r | " + " | ".join(_HEADINGS.values()) + " |",
        "|---|---:|" + "---:|" * len(_HEADINGS),
    ]
    for row in sorted(rows, key=lambda row: row.r):
        policy = f"{row.policy} less {row.base}" if row.base else row.policy
        cells = [_cell(name, row.figures[name], is_difference=row.base is not None) for name in _HEADINGS]
        lines.append(f"| {policy} | {row.r} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Means over {n_images} images, with 95 % intervals by the bootstrap over images; differences are paired. "
        + "; ".join(f"{_HEADINGS[name]}: {meaning}" for name, meaning in FIGURES.items())
        + ". A patch is the digit's where an eighth of its pixels are ink, else background.",
    ]
    return "\n".join(lines) + "\n"


def _cell(name: str, value: Estimate, *, is_difference: bool) -> str:
    scale = 100 if name in _PERCENT else 1
    sign = "+" if is_difference else ""
    low, high = (f"{scale * bound:{sign}.1f}" for bound in value.ci95)
    return f"{scale * value.mean:{sign}.1f} ({low} … {high})"


def plot(rows: Sequence[BackgroundRow], file: Path, title: str) -> None:
    """Draw each figure against r: the digit's patches in full lines, the background's in dashed ones."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    alone, group, purity = figure.subplots(1, 3)
    for policy in dict.fromkeys(row.policy for row in rows):
        line = sorted((row for row in rows if row.policy == policy and row.base is None), key=lambda row: row.r)
        for axes, name in ((alone, "alone"), (group, "group")):
            _draw_line(axes, line, f"digit_{name}", f"{policy}, digit", "-")
            _draw_line(axes, line, f"background_{name}", f"{policy}, background", "--")
        _draw_line(purity, line, "purity", policy, "-")
    alone.set(title="patches with a token of their own", ylabel="% of the kind's patches", ylim=(-3, 103))
    group.set(title="patches that a patch's token stands for", ylabel="mean over the kind's patches", yscale="log")
    group.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    group.minorticks_off()
    purity.set(title="tokens of the digit, no background", ylabel="% of tokens with digit", ylim=(-3, 103))
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
        color=COLOURS[line[0].policy],
        linestyle=style,
        marker="o",
        markersize=3,
        capsize=2,
        label=label,
    )


@dataclass(frozen=True)
class MergedImage:
    """An image and, for each policy, the token of each patch. Shapes: image uint8 (S, S, 3), mask (S, S), (patches,)"""

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    token_of_patch: dict[str, NDArray[np.int64]]


def picture(images: Sequence[MergedImage], file: Path, r: int) -> None:
    """Draw, an image a row, the image and what each policy merged: a colour and an outline for each token.

    A patch that has a token of its own keeps the image's colours. The digit's outline is white.
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
    """Twenty colours, the strong ones first; then again."""
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
