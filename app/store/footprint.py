"""Footprint: the memory that a version needs, estimated from the sizes of its files before it is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.errors import NotEnoughMemory
from app.store.manifest import Manifest, Variant

# Measured with ONNX Runtime at batches of 8 images of 197 tokens, for 128, 384 and 768 channels. Each graph took its
# weights once, 10 MB, and 13 to 16 tensors of a float per image, token and channel.
BYTES_PER_GRAPH = 10_000_000
N_WORK_TENSORS = 16
FLOAT_BYTES = 4


@dataclass(frozen=True)
class MemoryRule:
    """How the graphs of a version use memory, and how much there is.

    shares_weights: whether all graphs map one copy of them. count_free_bytes: memory that a new version may use.
    """

    max_batch_images: int
    shares_weights: bool
    count_free_bytes: Callable[[], int]


def require_memory(folder: Path, manifest: Manifest, specs: Sequence[Variant], rule: MemoryRule) -> None:
    """Check that these variants fit into memory. Otherwise the kernel would end the process while it loads them.

    Raises: NotEnoughMemory.
    """
    needed = estimate_bytes(manifest, specs, rule)
    if needed > rule.count_free_bytes():
        # Without the free bytes, which differ each time: a reason is logged once.
        n_graphs = len({spec.file for spec in specs})
        reason = (
            f"needs about {needed / 1e6:.0f} MB of memory for {n_graphs} graphs, more than is free; remove versions,"
            " export fewer rates, set DTEM_SHARE_WEIGHTS=true, or raise the memory limit"
        )
        raise NotEnoughMemory(folder, reason)


def estimate_bytes(manifest: Manifest, specs: Sequence[Variant], rule: MemoryRule) -> int:
    """Add up the files and the work memory of each graph. Without sharing, each has its own copy of the weights."""
    graphs = {spec.file: spec.requires for spec in specs}
    weights = [name for required in graphs.values() for name in required]
    files = [*graphs, *(sorted(set(weights)) if rule.shares_weights else weights)]
    tensor_bytes = FLOAT_BYTES * rule.max_batch_images * manifest.architecture.n_tokens * manifest.architecture.width
    work_bytes = len(graphs) * (BYTES_PER_GRAPH + N_WORK_TENSORS * tensor_bytes)
    return sum(manifest.files[name].bytes for name in files) + work_bytes
