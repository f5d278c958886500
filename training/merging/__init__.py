"""Token merging as pure functions: tensors in, tensors out, independent of any model."""

from training.merging.attention import AttentionForm, proportional_attention
from training.merging.matching import (
    IDENTITY,
    BipartiteMatching,
    Matching,
    bipartite_soft_matching,
    cosine_scores,
    match_by_scores,
)
from training.merging.metrics import Metric, feature_metric, key_metric, random_metric
from training.merging.schedule import Schedule, max_r, resolve_schedule, tokens_per_block
from training.merging.source import identity_source, unmerge

__all__ = [
    "IDENTITY",
    "AttentionForm",
    "BipartiteMatching",
    "Matching",
    "Metric",
    "Schedule",
    "bipartite_soft_matching",
    "cosine_scores",
    "feature_metric",
    "identity_source",
    "key_metric",
    "match_by_scores",
    "max_r",
    "proportional_attention",
    "random_metric",
    "resolve_schedule",
    "tokens_per_block",
    "unmerge",
]
