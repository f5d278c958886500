"""A vision transformer in training mode for its metric: merging relaxed, so that the loss reaches what it merges by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.merging import AttentionForm, Schedule
from training.merging.relaxed import Relaxation, relaxed_matching
from training.merging.schedule import Exhausted
from training.models.vit import MergingVisionTransformer, MetricChoice


class RelaxedVisionTransformer(MergingVisionTransformer):
    """The same model as its parent, each block's hard merge replaced by a relaxed one.

    Tokens merged away stay in the tail with what is left of their size, are attended to by that much, and take part in
    no later matching. keep_tail=False drops them as inference does: the sizes' sum is then no longer kept and what was
    left of a token gets no gradient in later blocks, but blocks get shorter.
    Where attention is not proportional (models that average their tokens), a token of size 1 and more counts as one.

    Source: arXiv 2412.10569, section 3.2.
    """

    def __init__(
        self,
        vit: nn.Module,
        schedule: Schedule,
        *,
        metric: MetricChoice,
        relaxation: Relaxation | None = None,
        keep_tail: bool = True,
        exhausted: Exhausted = "error",
        proportional_attention: bool | None = None,
        attention: AttentionForm = "augmented_values",
    ) -> None:
        super().__init__(
            vit,
            schedule,
            exhausted=exhausted,
            metric=metric,
            proportional_attention=proportional_attention,
            attention=attention,
        )
        self.relaxation, self.keep_tail = relaxation or Relaxation(), keep_tail

    def encode(self, x: Tensor, *, with_source: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the blocks; return tokens and sizes, the tail included where it is kept.

        Raises: ValueError when asked for a source map: relaxed groups overlap.
        """
        if with_source:
            raise ValueError("with_source: relaxed merging has no source map, its groups overlap")
        size: Tensor | None = None
        n_active = int(x.shape[1])
        for index, (block, r) in enumerate(zip(self.vit.blocks, self._resolve(n_active), strict=True)):
            hidden = block.norm1(x)
            qkv, _ = self._project(index, r > 0, block.attn, hidden)
            mixed, keys = self._attend(block.attn, qkv, hidden, self._weight(size))
            x = x + block.drop_path1(block.ls1(mixed))
            if r:
                metric = self.metric(block=index, hidden=hidden[:, :n_active], keys=keys[:, :, :n_active])
                matching = relaxed_matching(metric, r, self.relaxation, n_protected=self.n_protected)
                size = torch.ones_like(x[..., :1], dtype=torch.float32) if size is None else size
                x, size = matching.merge(x, size, keep_tail=self.keep_tail)
                n_active -= r
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x, size, None

    def _weight(self, size: Tensor | None) -> Tensor | None:
        return size if size is None or self.is_proportional else size.clamp(max=1)
