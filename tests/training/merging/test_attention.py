from typing import get_args

import pytest
import torch
from torch import Tensor

from training.merging import AttentionForm, key_metric, proportional_attention, random_metric

FORMS: tuple[AttentionForm, ...] = get_args(AttentionForm)


def heads(seed: int, n_tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 3, n_tokens, 5, generator=generator, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize("form", FORMS)
def test_token_of_size_m_counts_as_m_equal_tokens(form: AttentionForm) -> None:
    q, k, v = heads(1)
    times = torch.tensor([1, 4, 1, 2, 9, 1, 3])
    size = times.double().reshape(1, 7, 1).expand(2, -1, -1)
    repeated_k, repeated_v = k.repeat_interleave(times, dim=2), v.repeat_interleave(times, dim=2)
    weights = (q @ repeated_k.transpose(2, 3) / 5**0.5).softmax(-1)
    mixed = proportional_attention(q, k, v, size, form=form)
    torch.testing.assert_close(mixed, weights @ repeated_v, atol=1e-13, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_without_sizes_it_is_plain_attention(form: AttentionForm) -> None:
    q, k, v = heads(2)
    expected = (q @ k.transpose(2, 3) / 5**0.5).softmax(-1) @ v
    torch.testing.assert_close(proportional_attention(q, k, v, form=form), expected, atol=1e-13, rtol=0)
    ones = torch.ones(2, 7, 1, dtype=torch.float64)
    torch.testing.assert_close(proportional_attention(q, k, v, ones, form=form), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("form", ["masked", "plain", "augmented_keys"])
def test_dropout_drops_weights(form: AttentionForm) -> None:
    q, k, v = heads(3)
    torch.manual_seed(0)
    size = torch.full((2, 7, 1), 2.0, dtype=torch.float64)
    assert torch.equal(proportional_attention(q, k, v, size, form=form, dropout_p=1.0), torch.zeros_like(v))


def test_dropout_that_a_form_cannot_do_is_refused() -> None:
    q, k, v = heads(4)
    with pytest.raises(ValueError, match="dropout"):
        proportional_attention(q, k, v, torch.ones(2, 7, 1), form="augmented_values", dropout_p=0.1)


def test_unknown_form_is_refused() -> None:
    q, k, v = heads(5)
    with pytest.raises(ValueError, match="masked, plain"):
        proportional_attention(q, k, v, form="fast")  # type: ignore[arg-type]


def test_key_metric_is_the_mean_over_heads() -> None:
    _, k, v = heads(6)
    expected = sum(k[:, head] for head in range(3)) / 3
    torch.testing.assert_close(key_metric(block=0, hidden=v, keys=k), expected)


def test_random_metric_repeats_with_its_seed_and_draws_new_numbers_per_call() -> None:
    hidden = torch.zeros(2, 7, 4)
    first, again = random_metric(3), random_metric(3)
    draws = [metric(block=0, hidden=hidden, keys=hidden) for metric in (first, again, first)]
    assert draws[0].shape == (2, 7, 8)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])
