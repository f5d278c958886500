"""Image results made without running a graph."""

from typing import Any

from app.observability.record import ImageResult
from app.store.catalogue import ServedVariant
from app.store.manifest import Variant
from tests.app.tiny_store import make_variant


class NoRunner:
    def run(self, pixels: Any) -> Any:
        raise AssertionError("this runner must not run")


def make_result(policy: str, r: int, gmacs: float = 0.3, gmacs_saved: float = 0.3, **given: Any) -> ImageResult:
    """Make a result of model `vit`. given: other fields of ImageResult."""
    spec = Variant.model_validate(make_variant(policy, r, "onnx"), strict=False)
    variant = ServedVariant(spec, NoRunner(), unmerged_gmacs=gmacs + gmacs_saved)
    fields: dict[str, Any] = {
        "model": "vit",
        "variant": variant,
        "outputs": {},
        "tokens": [197, 11],
        "gmacs": gmacs,
        "batch_size": 1,
        "started_at": 0.0,
        "decode_seconds": 0.0,
        "queue_seconds": 0.1,
        "inference_seconds": 0.1,
        "is_degraded": False,
    }
    return ImageResult(**{**fields, **given})
