"""Outputs: the arrays that the graphs of a task return. A new task is one entry in TASKS."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from app.store.manifest import Manifest, Variant

# Additional outputs of adaptive policies, for any task.
TOKENS, GMACS = "tokens", "gmacs"
LOGITS = "logits"


@dataclass(frozen=True)
class GraphOutput:
    """role: the name that the service uses. name: the name in the graph. shape: of one image's row."""

    role: str
    name: str
    dtype: type[np.float32] | type[np.int64]
    shape: tuple[int, ...]


def _logits(manifest: Manifest) -> GraphOutput:
    return GraphOutput(LOGITS, manifest.output.name, np.float32, (len(manifest.labels),))


# The main output of each task, as the manifest describes it.
TASKS: Mapping[str, Callable[[Manifest], GraphOutput]] = {"classify": _logits}


def list_outputs(manifest: Manifest, variant: Variant) -> list[GraphOutput]:
    """List the outputs of a variant's graph, in the graph's order."""
    outputs = [TASKS[manifest.task](manifest)]
    if variant.data_dependent and manifest.output.tokens is not None and manifest.output.gmacs is not None:
        outputs.append(GraphOutput(TOKENS, manifest.output.tokens, np.int64, (manifest.architecture.depth + 1,)))
        outputs.append(GraphOutput(GMACS, manifest.output.gmacs, np.float32, ()))
    return outputs
