"""A vision transformer with adaptive merging: the number of tokens depends on the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.merging import AttentionForm, identity_source, key_metric
from training.merging.adaptive import Candidates, Thresholds, adaptive_matching, candidates, half_sizes
from training.merging.matching import IDENTITY, Matching
from training.models.embedding import DecoupledEmbedding
from training.models.macs import macs_of_tokens
from training.models.vit import MergingVisionTransformer, MetricChoice


class AdaptiveVisionTransformer(MergingVisionTransformer):
    """A ViT in which each block merges all pairs whose score exceeds the block's threshold.

    metric: "keys" or "features" is ATM; a `DecoupledEmbedding` is adaptive DTEM. Images of a batch
        keep different numbers of tokens, see `training.merging.adaptive`. A block with a threshold
        of 1 or more cannot merge, so it skips matching.
    Source: arXiv 2505.15160.
    """

    def __init__(
        self,
        vit: nn.Module,
        thresholds: Thresholds,
        *,
        metric: MetricChoice = "keys",
        proportional_attention: bool | None = None,
        attention: AttentionForm = "plain",
        join: bool = False,
    ) -> None:
        super().__init__(
            vit, 0, metric=metric, proportional_attention=proportional_attention, attention=attention, join=join
        )
        self.thresholds = thresholds
        self._per_block = thresholds.per_block(len(self.vit.blocks))

    def forward_counted(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, and the number of tokens of each image before each block and at the end.

        Shapes: (B, 3, H, W), normalised -> (B, classes), int64 (B, blocks + 1)
        """
        tokens, size, counts, _ = self._encode(self.embed(images), None)
        return self._classify(self.vit.norm(tokens), size), counts

    def macs(self, counts: Tensor) -> Tensor:
        """Return the MACs of each image, merging included, without the padding of its batch.

        Matching |A| with |B| tokens costs |A|·|B|·D for a metric of width D, merging |A|·|B|·C, and
        an embedding another N·C·D.
        Shapes: counts of `forward_counted`, int64 (B, blocks + 1) -> int64 (B,)
        """
        tokens = counts.unbind(dim=1)
        width = int(self.vit.embed_dim)
        macs: Tensor = macs_of_tokens(self.vit, tokens)
        for index, (n_tokens, threshold) in enumerate(zip(tokens, self._per_block, strict=False)):
            if threshold < 1:
                n_a, n_b = half_sizes(n_tokens, self.thresholds.split(index), self.n_protected)
                dim, embedding_macs = self._metric_dim(index)
                macs = macs + n_a * n_b * (dim + width) + n_tokens * embedding_macs
        return macs

    def _metric_dim(self, block: int) -> tuple[int, int]:
        """Return the width of the metric, and the MACs per token to compute it."""
        attn: Any = self.vit.blocks[block].attn
        if isinstance(self.metric, DecoupledEmbedding):
            dim = self.metric.config.dim
            return dim, dim * int(self.vit.embed_dim)
        return (int(attn.head_dim) if self.metric is key_metric else int(self.vit.embed_dim)), 0

    def encode(self, x: Tensor, *, with_source: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the blocks; return tokens, sizes (0 where a row is absent) and source map."""
        source = identity_source(x) if with_source else None
        tokens, size, _, source = self._encode(x, source)
        return tokens, size, source

    def _encode(self, x: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        size = torch.ones_like(x[..., :1], dtype=torch.float32)
        counts = [_n_present(size)]
        has_merged = False
        for index, (block, threshold) in enumerate(zip(self.vit.blocks, self._per_block, strict=True)):
            hidden = block.norm1(x)
            qkv, embedded = self._project(index, threshold < 1, block.attn, hidden)
            mixed, keys = self._attend(block.attn, qkv, hidden, self._weight(size if has_merged else None))
            x = x + block.drop_path1(block.ls1(mixed))
            matching = self._match_similar(index, threshold, size, hidden, keys, embedded)
            has_merged = has_merged or threshold < 1
            x, merged_size = matching.merge_mean(x, size)
            size = size if merged_size is None else merged_size
            source = source if source is None else matching.merge_sum(source)
            counts.append(_n_present(size))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x, size, torch.stack(counts, dim=1), source

    def _match_similar(
        self, block: int, threshold: float, size: Tensor, hidden: Tensor, keys: Tensor, embedded: Tensor | None
    ) -> Matching:
        if threshold >= 1:
            return IDENTITY
        metric = self.metric(block=block, hidden=hidden, keys=keys) if embedded is None else embedded
        return self.decide_similar(block, metric, size)

    def decide_similar(self, block: int, metric: Tensor, size: Tensor) -> Matching:
        """Decide which tokens merge in a block. Shapes: (B, N, D), (B, N, 1)"""
        return adaptive_matching(
            metric,
            size,
            self._per_block[block],
            split=self.thresholds.split(block),
            score=self.thresholds.score,
            n_protected=self.n_protected,
        )

    def candidates(self, block: int, metric: Tensor, size: Tensor) -> Candidates:
        """Return the halves and the scores of a block. Shapes: as `decide_similar`"""
        split, score = self.thresholds.split(block), self.thresholds.score
        return candidates(metric, size, split=split, score=score, n_protected=self.n_protected)

    def _weight(self, size: Tensor | None) -> Tensor | None:
        """Return the attention weights of the tokens; absent rows have weight 0 in any case."""
        return size if size is None or self.is_proportional else size.clamp(max=1)


def _n_present(size: Tensor) -> Tensor:
    return (size.squeeze(-1) > 0).sum(dim=1)
