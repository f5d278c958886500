"""The project's own export of random weights, on the CPU, each graph proved against eager."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.backends import ENGINES
from benchmarks.gpu.commit import read_commit
from benchmarks.gpu.models import RandomImages, draw_pixels, make_vit
from benchmarks.gpu.size import Size
from training.export.plan import Plan
from training.export.publish import publish
from training.models.classifier import input_rule

VERSION = "1"
Row = dict[str, Any]


def store_folder(work: Path, model: str) -> Path:
    return work / f"store-{model}"


def rows(size: Size, model: str, work: Path) -> Iterator[Row]:
    store = store_folder(work, model)
    store.mkdir(parents=True)
    vit: Any = make_vit(size.models[model])
    rule = input_rule(vit)
    plan = Plan(
        name=model,
        version=VERSION,
        timm_name=size.models[model].timm_name,
        timm_arguments=dict(size.models[model].arguments),
        recipe="random weights, seed 0, for measurements of speed alone",
        rates=size.rates,
        default_r=size.rates[-1],
        formats=(ENGINES[size.engine].graph_format,),
        git_commit=read_commit().removesuffix("-dirty"),
    )
    source = RandomImages(draw_pixels(size.n_store_images, rule), int(vit.num_classes))
    started_at = time.perf_counter()
    published = publish(vit, rule, source, plan, store)
    yield {
        "kind": "export",
        "model": model,
        "seconds": time.perf_counter() - started_at,
        "parity": {name: found.difference for name, found in published.parity.items()},
        "bytes": {file.name: file.stat().st_size for file in sorted(published.folder.iterdir())},
    }
