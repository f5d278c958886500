import itertools

import pytest

from training.models.variants import variant_id, variant_key


@pytest.mark.parametrize(
    ("policy", "r", "precision", "key"),
    [
        ("none", 0, "float32", "none-r0"),
        ("dtem", 16, "float32", "dtem-r16"),
        ("dtem", 16, "int8", "dtem-r16-int8"),
        ("atm", None, "float32", "atm"),
        ("adaptive-dtem", None, "int8", "adaptive-dtem-int8"),
    ],
)
def test_key_leaves_out_float32_only(policy: str, r: int | None, precision: str, key: str) -> None:
    assert variant_key(policy, r, precision) == key


def test_id_names_precision_and_format() -> None:
    assert variant_id("tome", 8, "float32", "onnx") == "tome-r8-float32-onnx"
    assert variant_id("atm", None, "int8", "onnx") == "atm-int8-onnx"


def test_no_two_variants_share_a_key_or_an_id() -> None:
    variants = list(itertools.product(["none", "dtem", "atm", "adaptive-dtem"], [None, 0, 1, 11], ["float32", "int8"]))
    assert len({variant_key(*variant) for variant in variants}) == len(variants)
    assert len({variant_id(*variant, "onnx") for variant in variants}) == len(variants)
