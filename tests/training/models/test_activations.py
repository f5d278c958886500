"""Batches follow the size of the model and the number that run at the same time."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.training.tiny_vit import ARGUMENTS
from training.data.preprocessing import InputRule
from training.models import load_vit
from training.models.activations import BUDGET_BYTES, MAX_BATCH, activation_bytes, images_at_once
from training.models.classifier import frozen_classifier


def test_batches_fall_with_tokens_and_parallel_runs() -> None:
    small, large = (load_vit("vit_tiny_patch16_224", **(ARGUMENTS | {"img_size": size})).eval() for size in (112, 224))
    assert images_at_once(small) == MAX_BATCH
    assert images_at_once(small, 3) == 3
    assert images_at_once(large) < MAX_BATCH
    assert 1 < images_at_once(large, n_parallel=4) <= images_at_once(large) // 4 + 1
    assert images_at_once(large, n_parallel=10**6) == 1
    assert images_at_once(large) * activation_bytes(large) <= BUDGET_BYTES


@pytest.mark.parametrize("r", [0, 8])
def test_estimate_covers_what_eager_takes(r: int) -> None:
    vit = load_vit("vit_tiny_patch16_224", **(ARGUMENTS | {"img_size": 224})).eval()
    rule = InputRule(height=224, width=224, resize_shorter_side=224)
    module = frozen_classifier(vit, rule, r)
    pixels = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        module(pixels)
    held = peak = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0.2 * activation_bytes(vit) < peak < activation_bytes(vit)
