"""Training and serving agree on the key of a variant, which names its golden outputs."""

from pathlib import Path

import numpy as np
import pytest

from app.store.manifest import Manifest, VariantKey
from app.store.outputs import list_outputs
from training.models.variants import variant_key

STORE = Path(__file__).parents[2] / "model_store"


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(("policy", "r"), [("none", 0), ("tome", 8), ("adaptive-dtem", None)])
def test_both_halves_make_the_same_key(policy: str, r: int | None, precision: str) -> None:
    assert str(VariantKey(policy, r, precision)) == variant_key(policy, r, precision)


def test_keys_of_different_variants_differ() -> None:
    keys = [
        VariantKey(policy, r, precision)
        for policy in ("tome", "dtem")
        for r in (None, 0, 8)
        for precision in ("float32", "int8")
    ]
    assert len({str(key) for key in keys}) == len(keys)


@pytest.mark.parametrize("path", sorted(STORE.glob("*/*/manifest.json")), ids=str)
def test_golden_outputs_are_named_by_role_and_key(path: Path) -> None:
    manifest = Manifest.model_validate_json(path.read_bytes())
    with np.load(path.parent / manifest.golden.file) as archive:
        found = set(archive.files) - {"pixels"}
    expected = {f"{output.role}/{spec.key}" for spec in manifest.variants for output in list_outputs(manifest, spec)}
    assert found == expected
