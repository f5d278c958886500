"""A vision transformer that merges what is similar enough: each image keeps as many tokens as it needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.merging import AttentionForm, identity_source
from training.merging.adaptive import Thresholds, adaptive_matching
from training.models.vit import MergingVisionTransformer, MetricChoice


class AdaptiveVisionTransformer(MergingVisionTransformer):
    """The same model as its parent, each block merging every pair whose score exceeds the block's threshold.

    metric: "keys" is ATM; a `DecoupledEmbedding` is adaptive DTEM.
    Images of a batch keep different numbers of tokens: see `training.merging.adaptive`.
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
        """Return logits, and how many tokens each image had before each block and at the end.

        Shapes: (B, 3, H, W), normalised -> (B, classes), int64 (B, blocks + 1)
        """
        tokens, size, counts, _ = self._encode(self.embed(images), None)
        return self._classify(self.vit.norm(tokens), size), counts

    def encode(self, x: Tensor, *, with_source: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the blocks; return tokens, sizes (0 where a row is absent) and source map."""
        source = identity_source(x) if with_source else None
        tokens, size, _, source = self._encode(x, source)
        return tokens, size, source

    def _encode(self, x: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        size = torch.ones_like(x[..., :1], dtype=torch.float32)
        counts = [_n_present(size)]
        for index, (block, threshold) in enumerate(zip(self.vit.blocks, self._per_block, strict=True)):
            hidden = block.norm1(x)
            qkv, embedded = self._project(index, True, block.attn, hidden)
            mixed, keys = self._attend(block.attn, qkv, hidden, self._weight(size if index else None))
            x = x + block.drop_path1(block.ls1(mixed))
            matching = adaptive_matching(
                self.metric(block=index, hidden=hidden, keys=keys) if embedded is None else embedded,
                size,
                threshold,
                split=self.thresholds.split(index),
                score=self.thresholds.score,
                n_protected=self.n_protected,
            )
            x, merged_size = matching.merge_mean(x, size)
            size = size if merged_size is None else merged_size
            source = source if source is None else matching.merge_sum(source)
            counts.append(_n_present(size))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x, size, torch.stack(counts, dim=1), source

    def _weight(self, size: Tensor | None) -> Tensor | None:
        """Absent rows draw no attention, whether or not it is proportional."""
        return size if size is None or self.is_proportional else size.clamp(max=1)


def _n_present(size: Tensor) -> Tensor:
    return (size.squeeze(-1) > 0).sum(dim=1)
