import pytest
from torch import Tensor

from training.merging import policies
from training.merging.metrics import METRICS
from training.merging.policies import (
    FIXED_POLICIES,
    POLICIES,
    UNMERGED,
    Policy,
    adaptive_policy,
    check_policies,
    default_policy,
    find_policy,
    supported_policies,
)


def embedding(*, block: int, hidden: Tensor, keys: Tensor) -> Tensor:
    return hidden


def test_labels_and_colours_are_distinct() -> None:
    assert len({policy.label for policy in POLICIES}) == len(POLICIES)
    assert len({policy.colour for policy in POLICIES}) == len(POLICIES)
    assert all(policy.needs_embedding or policy.metric in METRICS for policy in POLICIES)


def test_adaptive_policies_are_found_by_their_metric() -> None:
    assert find_policy("atm", "keys").label == "atm (keys)"
    assert adaptive_policy("features") is find_policy("atm", "features")
    assert adaptive_policy("embedding").name == "adaptive-dtem"
    assert find_policy("none") is UNMERGED
    for name, metric in (("atm", None), ("atm", "embedding"), ("bogus", None)):
        with pytest.raises(ValueError, match=f"policy '{name}' .* expected one of none, tome"):
            find_policy(name, metric)
    with pytest.raises(ValueError, match="metric 'values': expected one of"):
        adaptive_policy("values")


def test_policies_that_need_an_embedding_are_offered_with_one() -> None:
    assert [policy.name for policy in supported_policies(has_embedding=False)] == ["none", "tome"]
    assert [policy.name for policy in supported_policies(has_embedding=True)] == ["none", "tome", "dtem"]
    assert (default_policy(has_embedding=False), default_policy(has_embedding=True)) == ("tome", "dtem")


def test_metric_is_the_embedding_where_the_policy_needs_one() -> None:
    assert FIXED_POLICIES["tome"].resolve_metric(embedding) == "keys"
    assert FIXED_POLICIES["dtem"].resolve_metric(embedding) is embedding
    check_policies(["none", "dtem"], embedding)
    with pytest.raises(ValueError, match="policy dtem needs an embedding"):
        check_policies(["none", "dtem"], None)


def test_one_entry_adds_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    added = Policy("hidden", "constant", metric=embedding, colour="tab:olive")
    monkeypatch.setattr(policies, "FIXED_POLICIES", {**FIXED_POLICIES, "hidden": added})
    check_policies(["hidden"], None)
    assert added in supported_policies(has_embedding=False)
    assert (added.label, added.resolve_metric(None)) == ("hidden", embedding)
