"""Variant keys: one name per policy, rate and precision, for files, golden outputs and manifests."""

from __future__ import annotations

FLOAT32 = "float32"
"""The precision that a key leaves out, so that the keys of published versions stay valid."""


def variant_key(policy: str, r: int | None, precision: str = FLOAT32) -> str:
    """Return <policy>[-r<r>][-<precision>]: r is None for adaptive policies, and float32 is left out.

    >>> variant_key("tome", 8), variant_key("tome", 8, "int8"), variant_key("atm", None)
    ('tome-r8', 'tome-r8-int8', 'atm')
    """
    parts = [policy] + ([] if r is None else [f"r{r}"]) + ([] if precision == FLOAT32 else [precision])
    return "-".join(parts)


def variant_id(policy: str, r: int | None, precision: str, graph_format: str) -> str:
    """Return the id in the manifest, which always names precision and format.

    >>> variant_id("tome", 8, "float32", "onnx")
    'tome-r8-float32-onnx'
    """
    return f"{variant_key(policy, r)}-{precision}-{graph_format}"
