from typing import Any

import pytest
import torch

from tests.training.models.families import FAMILIES, build
from training.merging import resolve_schedule
from training.models import MergingVisionTransformer, count_macs, load_vit, matching_macs, vit_macs
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig

PUBLISHED_GMACS = {0: 4.60, 8: 3.42, 10: 3.13, 11: 2.99, 12: 2.84, 13: 2.70, 16: 2.29}


@pytest.mark.parametrize(("r", "gmacs"), PUBLISHED_GMACS.items())
def test_formula_gives_the_published_figures_of_deit_s(r: int, gmacs: float) -> None:
    with torch.device("meta"):
        vit = load_vit("deit_small_patch16_224")
    schedule = resolve_schedule(r, depth=12, n_tokens=197, exhausted="reduce")
    assert round(vit_macs(vit, schedule) / 1e9, 2) == gmacs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schedule", [[0, 0, 0], [11, 0, 7], [1, 9, 10]])
def test_counted_macs_are_the_formula_with_the_cost_of_merging(family: str, schedule: list[int]) -> None:
    vit = build(family)
    counted = count_macs(MergingVisionTransformer(vit, schedule), 48)
    assert counted == vit_macs(vit, schedule) + matching_macs(vit, schedule)
    assert (matching_macs(vit, schedule) > 0) == any(schedule)
    assert count_macs(vit, (48, 48)) == vit_macs(vit, [0, 0, 0])


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("schedule", [[0, 0, 0], [11, 0, 7]])
def test_counted_macs_of_an_embedding_are_the_formula(schedule: list[int], join: bool) -> None:
    vit: Any = build("registers")
    own = DecoupledEmbedding(EmbeddingConfig(depth=3, width=int(vit.embed_dim), dim=5, r=4))
    model = MergingVisionTransformer(vit, schedule, metric=own.double(), join=join).double()
    assert count_macs(model, 48) == vit_macs(vit, schedule) + matching_macs(vit, schedule, embedding_dim=5)


def test_embedding_costs_the_published_share_of_deit_s() -> None:
    with torch.device("meta"):
        vit = load_vit("deit_small_patch16_224")
    schedule = [1] * 12  # hardly any merging; d' is the width of keys, so only the rows differ
    more = matching_macs(vit, schedule, embedding_dim=64) - matching_macs(vit, schedule)
    assert more / vit_macs(vit, schedule) == pytest.approx(0.0125, abs=0.0003)


@pytest.mark.parametrize("form", ["masked", "plain"])
def test_count_does_not_depend_on_the_form_of_attention(form: str) -> None:
    vit = build("augreg")
    model = MergingVisionTransformer(vit, 5, attention=form)  # type: ignore[arg-type]
    assert count_macs(model, 48) == vit_macs(vit, [5] * 3) + matching_macs(vit, [5] * 3)


def test_counting_leaves_the_model_in_training() -> None:
    model = MergingVisionTransformer(build("augreg")).train()
    count_macs(model, 48)
    assert model.training
    assert model.vit.blocks.training
