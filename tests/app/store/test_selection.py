import json
from dataclasses import replace

import pytest

from app.errors import (
    BudgetNotMet,
    ConflictingParameters,
    InvalidParameter,
    RateNotExported,
    ServiceError,
    UnknownModel,
    UnknownPolicy,
    UnknownVersion,
)
from app.store.catalogue import Catalogue, ServedModel, ServedVariant
from app.store.manifest import VariantKey
from app.store.selection import Query, read_fraction, select
from tests.app.simulation import make_served

Variants = dict[VariantKey, ServedVariant]


def chosen(catalogue: Catalogue, **parameters: str) -> tuple[str, int | None]:
    spec = select(catalogue, Query(**parameters)).variant.spec
    return spec.policy, spec.r


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, ("tome", 8)),
        ({"r": "16"}, ("tome", 16)),
        ({"r": "0"}, ("tome", 0)),
        ({"policy": "tome"}, ("tome", 8)),
        ({"policy": "none"}, ("none", 0)),
        ({"policy": "none", "r": "0"}, ("none", 0)),
        ({"model": "tiny", "version": "1", "r": "8"}, ("tome", 8)),
        ({"policy": "atm"}, ("atm", None)),
    ],
)
def test_select_returns_the_requested_variant(
    catalogue: Catalogue, parameters: dict[str, str], expected: tuple[str, int | None]
) -> None:
    assert chosen(catalogue, **parameters) == expected


def test_select_lists_the_rates_of_the_policy_for_an_unknown_rate(catalogue: Catalogue) -> None:
    with pytest.raises(RateNotExported) as caught:
        select(catalogue, Query(r="3"))
    assert caught.value.detail == "Policy 'tome' has no graph for r=3; accepted: 0, 8, 16."
    assert caught.value.members == {"field": "r", "value": 3, "policy": "tome", "accepted": [0, 8, 16]}
    with pytest.raises(RateNotExported) as caught:
        select(catalogue, Query(r="8", policy="none"))
    assert caught.value.members["accepted"] == [0]


@pytest.mark.parametrize(
    "r", ["abc", "-1", "16.0", "", " 16", "+16", "016", "1e1", "1_6", "١٦", "9" * 5000, "16\x00", "NaN"]
)
def test_select_refuses_rates_that_are_not_whole_numbers(catalogue: Catalogue, r: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        select(catalogue, Query(r=r))
    assert caught.value.members["accepted"] == [0, 8, 16]
    assert len(caught.value.detail) < 300


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"model": "nope"}, UnknownModel),
        ({"model": ""}, UnknownModel),
        ({"version": "2"}, UnknownVersion),
        ({"version": "01"}, UnknownVersion),
        ({"policy": "dtem"}, UnknownPolicy),
        ({"top_k": "0"}, InvalidParameter),
        ({"top_k": "4"}, InvalidParameter),
        ({"top_k": "all"}, InvalidParameter),
    ],
)
def test_select_refuses_unknown_values(
    catalogue: Catalogue, parameters: dict[str, str], error: type[ServiceError]
) -> None:
    with pytest.raises(error):
        select(catalogue, Query(**parameters))


def test_select_top_k_defaults_to_all_classes_of_a_small_model(catalogue: Catalogue) -> None:
    assert select(catalogue, Query()).top_k == 3
    assert select(catalogue, Query(top_k="1")).top_k == 1


@pytest.mark.parametrize("r", ["0", "8", "many"])
def test_select_refuses_a_rate_for_an_adaptive_policy(catalogue: Catalogue, r: str) -> None:
    with pytest.raises(InvalidParameter, match="policy 'atm' is adaptive and has no rates") as caught:
        select(catalogue, Query(policy="atm", r=r))
    assert caught.value.members == {"field": "r", "value": r, "policy": "atm", "accepted": []}


@pytest.mark.parametrize("value", [2 / 3, 0.01484715594608751, 0.00012345678901234567, 1e-05, 1 - 2**-53, 0.0, 1.0])
def test_accuracies_that_models_state_are_accepted(value: float) -> None:
    assert read_fraction(json.dumps(value)) == value


# As of the reference model: accuracy falls at high rates, but a low rate can be more accurate than rate 0.
TOP1 = {0: 0.9675, 4: 0.9674, 8: 0.9676, 12: 0.9668, 16: 0.9661}


@pytest.fixture
def measured(catalogue: Catalogue) -> Catalogue:
    """A catalogue whose policy tome costs 10 - r / 10 GMACs."""
    model = catalogue.find(None, None)
    served = [make_served(r, {1: 0.01}, top1) for r, top1 in TOP1.items()]
    variants: Variants = {variant.spec.key: variant for variant in served}
    adaptive = {key: variant for key, variant in model.variants.items() if key.policy == "atm"}
    return Catalogue({"tiny": {1: ServedModel(model.manifest, {**variants, **adaptive})}}, "tiny")


def ladder(catalogue: Catalogue, **parameters: str) -> list[int | None]:
    return [variant.spec.r for variant in select(catalogue, Query(**parameters)).ladder]


@pytest.mark.parametrize(
    ("parameters", "rates"),
    [
        ({"r": "0"}, [0]),
        ({"r": "0", "allow_degrade": "false"}, [0]),
        ({"r": "4", "allow_degrade": "true"}, [4, 8, 12, 16]),
        ({"r": "4", "allow_degrade": "True"}, [4, 8, 12, 16]),
        ({"r": "4", "max_r": "12"}, [4, 8, 12]),
        ({"r": "4", "max_r": "15", "allow_degrade": "1"}, [4, 8, 12]),
        ({"r": "4", "max_r": "4"}, [4]),
        ({"max_r": "12"}, [8, 12]),
        ({"allow_degrade": "true"}, [8, 12, 16]),
        ({"max_gmacs": "9.6"}, [8]),
        ({"max_gmacs": "9.2"}, [8]),
        ({"max_gmacs": "9.19"}, [12]),
        ({"max_gmacs": "1e2"}, [8]),
        ({"max_gmacs": "8.4"}, [16]),
        ({"max_gmacs": "9.2", "max_r": "12"}, [8, 12]),
        ({"min_accuracy": "0.9675"}, [8]),
        ({"min_accuracy": "0.966"}, [16]),
        ({"min_accuracy": ".9662"}, [12]),
        ({"min_accuracy": "0"}, [16]),
        ({"min_accuracy": "0.9676", "allow_degrade": "true"}, [8, 12, 16]),
        ({"deadline_ms": "40"}, [8, 12, 16]),
        ({"deadline_ms": "0.5"}, [8, 12, 16]),
        ({"deadline_ms": "40", "allow_degrade": "false"}, [8, 12, 16]),
        ({"deadline_ms": "40", "max_r": "12"}, [8, 12]),
        ({"deadline_ms": "40", "max_r": "5"}, [0, 4]),
        ({"deadline_ms": "40", "policy": "atm"}, [None]),
        ({"policy": "atm", "allow_degrade": "true"}, [None]),
        ({"policy": "atm", "max_gmacs": "0.9"}, [None]),
    ],
)
def test_select_returns_the_ladder(measured: Catalogue, parameters: dict[str, str], rates: list[int | None]) -> None:
    assert ladder(measured, **parameters) == rates


def test_select_reads_the_deadline(measured: Catalogue) -> None:
    assert select(measured, Query(deadline_ms="40")).deadline_seconds == pytest.approx(0.04)
    assert select(measured, Query(r="8")).deadline_seconds is None


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"max_gmacs": "0"}, "max_gmacs"),
        ({"max_gmacs": "-1"}, "max_gmacs"),
        ({"max_gmacs": "nan"}, "max_gmacs"),
        ({"max_gmacs": "inf"}, "max_gmacs"),
        ({"max_gmacs": "1_0"}, "max_gmacs"),
        ({"max_gmacs": " 1"}, "max_gmacs"),
        ({"max_gmacs": ""}, "max_gmacs"),
        ({"max_gmacs": "9" * 400}, "max_gmacs"),
        ({"min_accuracy": "1.01"}, "min_accuracy"),
        ({"min_accuracy": "95"}, "min_accuracy"),
        ({"min_accuracy": "95%"}, "min_accuracy"),
        ({"deadline_ms": "0"}, "deadline_ms"),
        ({"deadline_ms": "-5"}, "deadline_ms"),
        ({"deadline_ms": "1e9"}, "deadline_ms"),
        ({"deadline_ms": "40ms"}, "deadline_ms"),
        ({"allow_degrade": "yes"}, "allow_degrade"),
        ({"allow_degrade": ""}, "allow_degrade"),
        ({"deadline_ms": "40", "allow_degrade": "perhaps"}, "allow_degrade"),
        ({"max_r": "x"}, "max_r"),
        ({"r": "8", "max_r": "4"}, "max_r"),
        ({"policy": "atm", "max_r": "4"}, "max_r"),
        ({"policy": "atm", "deadline_ms": "40", "max_r": "4"}, "max_r"),
    ],
)
def test_select_names_the_field_of_a_refused_value(measured: Catalogue, parameters: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        select(measured, Query(**parameters))
    assert caught.value.members["field"] == field
    assert len(caught.value.detail) < 300


@pytest.mark.parametrize(
    "parameters",
    [
        {"r": "8", "max_gmacs": "9"},
        {"r": "8", "deadline_ms": "40"},
        {"min_accuracy": "0.9", "max_gmacs": "9"},
        {"r": "8", "max_gmacs": "9", "min_accuracy": "0.9", "deadline_ms": "40"},
        {"r": "8", "max_r": "16", "allow_degrade": "false"},
    ],
)
def test_select_refuses_mutually_exclusive_parameters(measured: Catalogue, parameters: dict[str, str]) -> None:
    with pytest.raises(ConflictingParameters) as caught:
        select(measured, Query(**parameters))
    assert set(caught.value.members["fields"]) <= set(parameters)
    assert len(caught.value.members["fields"]) >= 2


def test_select_states_the_nearest_budget_that_can_be_met(measured: Catalogue) -> None:
    with pytest.raises(BudgetNotMet, match=r"costs at most 8\.3 GMACs") as caught:
        select(measured, Query(max_gmacs="8.3"))
    assert caught.value.members["minimum"] == pytest.approx(8.4)
    with pytest.raises(BudgetNotMet, match=r"at least 0\.97") as caught:
        select(measured, Query(min_accuracy="0.97"))
    assert caught.value.members["maximum"] == pytest.approx(0.9676)
    # The mean is 0.7, but the 95th percentile is 0.9.
    with pytest.raises(BudgetNotMet):
        select(measured, Query(policy="atm", max_gmacs="0.8"))
    # Its accuracy was not measured.
    with pytest.raises(BudgetNotMet):
        select(measured, Query(policy="atm", min_accuracy="0.1"))


def test_unmeasured_variants_rank_by_their_cost(catalogue: Catalogue) -> None:
    model = catalogue.find(None, None)
    variants: Variants = {}
    for r in (0, 8):
        measured = make_served(r, {1: 0.01})
        spec = measured.spec.model_copy(update={"accuracy": None})
        variants[spec.key] = replace(measured, spec=spec)
    unmeasured = Catalogue({"tiny": {1: ServedModel(model.manifest, variants)}}, "tiny")
    assert ladder(unmeasured, max_gmacs="100") == [0]
    assert ladder(unmeasured, deadline_ms="40") == [0, 8]
