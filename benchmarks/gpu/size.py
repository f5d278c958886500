"""How much is measured: all of it on a GPU, or tiny models on a CPU, to prove that every step runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from training.merging import AttentionForm

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Architecture:
    """A ViT as timm knows it."""

    timm_name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """Units: sides in numbers of a matrix; seconds of one timing and of one load.

    forms: of attention, beside the plain one that is exported.
    engine: of the service, a name in `ENGINES`.
    load_rates: the first is what the others are compared with, as with `rates`.
    """

    device: Device
    models: Mapping[str, Architecture]
    precisions: tuple[str, ...]
    rates: tuple[int, ...]
    batches: tuple[int, ...]
    forms: tuple[AttentionForm, ...]
    n_rounds: int
    least_seconds: float
    matrix_side: int
    n_store_images: int
    load_rates: tuple[int, ...]
    n_connections: tuple[int, ...]
    load_seconds: float
    n_load_rounds: int
    max_batch_images: int
    training_batch: int
    training_rates: tuple[int, ...]
    settings: Mapping[str, str]
    engine: str = "torchscript"


SMALL_MODEL = Architecture(
    "vit_tiny_patch16_224", {"img_size": 112, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
)
FULL = Size(
    device="cuda",
    models={
        "deit-s": Architecture("deit_small_patch16_224"),
        "vit-b": Architecture("vit_base_patch16_224"),
    },
    precisions=("float32", "float16"),
    rates=(0, 8, 16),
    batches=(1, 32, 256),
    forms=("masked", "augmented_keys", "augmented_values"),
    n_rounds=6,
    least_seconds=0.02,
    matrix_side=8192,
    n_store_images=48,
    load_rates=(0, 16),
    n_connections=(32, 64),
    load_seconds=2.5,
    n_load_rounds=2,
    max_batch_images=64,
    training_batch=128,
    training_rates=(16,),
    settings={"n_decode_threads": "12", "max_queue_images": "256", "max_in_flight_images": "512"},
)
SMOKE = Size(
    device="cpu",
    models={"deit-s": SMALL_MODEL},
    precisions=("float32", "bfloat16"),  # a CPU is slow in float16
    rates=(0, 8, 16),
    batches=(1, 2),
    forms=("masked",),
    n_rounds=6,
    least_seconds=0.0,
    matrix_side=128,
    n_store_images=48,
    load_rates=(0, 16),
    n_connections=(4,),
    load_seconds=0.2,
    n_load_rounds=1,
    max_batch_images=4,
    training_batch=2,
    training_rates=(16,),
    settings={"n_decode_threads": "1", "n_threads": "1"},
)
SIZES = {"full": FULL, "smoke": SMOKE}
