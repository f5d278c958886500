"""A vision transformer with relaxed merging, through which a loss can train the metric."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.merging import AttentionForm, Schedule
from training.merging.relaxed import Relaxation, relaxed_matching
from training.merging.schedule import Exhausted
from training.models.vit import MergingVisionTransformer, MetricChoice


class RelaxedVisionTransformer(MergingVisionTransformer):
    """The model of its parent, with relaxed instead of hard merging in each block.

    Merged tokens stay in the tail with their remaining size, which weights the attention that they
    receive, and take no part in later matchings. keep_tail=False drops them, as inference does.
    Blocks are then shorter, but sizes no longer keep their sum, and the remainder of a token gets
    no gradient in later blocks. Where attention is not proportional (models that average tokens),
    sizes of 1 and more count as 1.

    Source: arXiv 2412.10569, section 3.2.
    Differs from the paper: for models that average tokens, its code trains with proportional
        attention and turns it off at inference; here it is off in both, and only the remaining
        sizes below 1, which inference does not have, weight the attention.
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
        """Run the blocks; return tokens and sizes, including the tail if it is kept.

        Raises: ValueError for with_source, since relaxed groups overlap.
        """
        if with_source:
            raise ValueError("with_source: relaxed merging has no source map, since its groups overlap")
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
