"""A timm vision transformer that merges tokens in each block.

timm's model is wrapped, not patched: its parts are called, and its attributes stay unchanged. No
other module of the models imports timm.
"""

import difflib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import PretrainedCfg
from torch import Tensor, nn

from training.merging import (
    AttentionForm,
    Matching,
    Metric,
    Schedule,
    bipartite_soft_matching,
    identity_source,
    proportional_attention,
    resolve_schedule,
    tokens_per_block,
)
from training.merging.matching import IDENTITY
from training.merging.metrics import METRICS
from training.merging.schedule import Exhausted
from training.models.embedding import DecoupledEmbedding, JoinedProjections
from training.models.head import TOKEN_AND_AVERAGE, TokenAndAverage, weighted_average
from training.models.support import UnsupportedArchitecture, check_family, check_model
from training.models.weights import WeightsMismatch, load_weights

__all__ = ["MergedFeatures", "MergingVisionTransformer", "UnsupportedArchitecture", "WeightsMismatch", "load_vit"]

MetricChoice: TypeAlias = str | Metric
"""A name in `METRICS`, or any `Metric`."""


class MergedFeatures(NamedTuple):
    """The remaining tokens after the final norm. Shapes: (B, N, C), (B, N, 1), (B, N, N_in)

    source refers to the tokens before the first block, protected ones first.
    """

    tokens: Tensor
    size: Tensor
    source: Tensor | None


class MergingVisionTransformer(nn.Module):
    """timm's vision transformer, merging tokens between the attention and the MLP of each block.

    schedule: see `training.merging.Schedule`. It is resolved for the model's number of tokens, and
        again where images or patch dropout change that number.
    metric: a name in `METRICS` (keys, features, random), or any `Metric`.
    proportional_attention: None means on where a class token is pooled, and off where tokens are
        averaged, as for masked autoencoders (arXiv 2210.09461, table 6).
    attention: the form of the computation, for kernels and exported graphs; see `AttentionForm`.
    join: compute a `DecoupledEmbedding` with rows appended to copies of the qkv weights, in one
        GEMM, as exported graphs do. For inference only: the copies do not follow changes of the
        ViT's qkv layers. With r = 0 in all blocks the logits are timm's.

    Raises: UnsupportedArchitecture, naming the reason; EmbeddingMismatch; ValueError where a block
        has too few tokens for the schedule.
    """

    def __init__(
        self,
        vit: nn.Module,
        schedule: Schedule = 0,
        *,
        exhausted: Exhausted = "error",
        metric: MetricChoice = "keys",
        metric_seed: int = 0,
        proportional_attention: bool | None = None,
        attention: AttentionForm = "masked",
        join: bool = False,
    ) -> None:
        super().__init__()
        check_model(vit)
        self.vit = cast(Any, vit)
        self.is_averaging = self.vit.global_pool == "avg"
        self.is_proportional = not self.is_averaging if proportional_attention is None else proportional_attention
        self.attention: AttentionForm = attention
        self.metric = _metric(metric, metric_seed)
        if isinstance(metric, DecoupledEmbedding):
            metric.check_fits(vit)
        self.joined = JoinedProjections(vit, metric) if join and isinstance(metric, DecoupledEmbedding) else None
        self.n_protected = int(self.vit.num_prefix_tokens)
        self._requested, self._exhausted = schedule, exhausted
        n_tokens = int(self.vit.patch_embed.num_patches) + self.n_protected
        self.schedule = self._resolve(n_tokens)
        self.tokens = tokens_per_block(self.schedule, n_tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits. Shapes: (B, 3, H, W), normalised -> (B, classes)"""
        tokens, size, _ = self.encode(self.embed(images))
        return self._classify(self.vit.norm(tokens), size)

    def forward_features(self, images: Tensor, *, with_source: bool = False) -> MergedFeatures:
        """Return the remaining tokens, their sizes and, if requested, the source map."""
        tokens, size, source = self.encode(self.embed(images), with_source=with_source)
        return MergedFeatures(self.vit.norm(tokens), torch.ones_like(tokens[..., :1]) if size is None else size, source)

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens before the first block.

        Shapes: (B, 3, H, W), normalised -> (B, N, C)
        """
        tokens: Tensor = self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(self.vit.patch_embed(images))))
        return tokens

    def encode(self, x: Tensor, *, with_source: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the blocks; return tokens, sizes (None while nothing merged) and source map.

        Shapes: as `MergedFeatures`, before the final norm.
        """
        size: Tensor | None = None
        source = identity_source(x) if with_source else None
        for index, (block, r) in enumerate(zip(self.vit.blocks, self._resolve(int(x.shape[1])), strict=True)):
            hidden = block.norm1(x)
            qkv, embedded = self._project(index, r > 0, block.attn, hidden)
            mixed, keys = self._attend(block.attn, qkv, hidden, self._weight(size))
            x = x + block.drop_path1(block.ls1(mixed))
            matching = self._match(index, r, hidden, keys, embedded)
            x, size = matching.merge_mean(x, size)
            if source is not None:
                source = matching.merge_sum(source)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x, size, source

    def _project(
        self, block: int, is_merging: bool, attn: Any, hidden: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return queries, keys and values, (B, heads, N, d) each, and a joined embedding."""
        if self.joined is None or not is_merging:
            qkv = attn.qkv(hidden)
            heads = qkv.reshape(*qkv.shape[:2], 3 * attn.num_heads, attn.head_dim).transpose(1, 2)
            return heads.chunk(3, dim=1), None
        *parts, embedded = self.joined(block, hidden)
        return tuple(part.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for part in parts), embedded

    def _attend(
        self, attn: Any, qkv: tuple[Tensor, ...], hidden: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output of timm's Attention with weighted keys, and the keys after any k-norm."""
        q, k, v = qkv
        q, k = attn.q_norm(q), attn.k_norm(k)
        mixed = proportional_attention(
            q,
            k,
            v,
            weight,
            form=self.attention,
            dropout_p=attn.attn_drop.p if attn.training else 0.0,
        )
        mixed = attn.norm(mixed.transpose(1, 2).flatten(2))
        if attn.gate is not None:
            mixed = mixed * attn.gate(hidden).sigmoid()
        return attn.proj_drop(attn.proj(mixed)), k

    def _weight(self, size: Tensor | None) -> Tensor | None:
        """Return the weight of each token in attention, None for equal weights.

        Shapes: (B, N, 1) -> the same
        """
        return size if self.is_proportional else None

    def _match(self, block: int, r: int, hidden: Tensor, keys: Tensor, embedded: Tensor | None) -> Matching:
        if r == 0:
            return IDENTITY
        metric = self.metric(block=block, hidden=hidden, keys=keys) if embedded is None else embedded
        return self.decide(metric, r)

    def decide(self, metric: Tensor, r: int) -> Matching:
        """Decide which r tokens merge. Shapes: metric (B, N, D)"""
        return bipartite_soft_matching(metric, r, n_protected=self.n_protected)

    def _classify(self, tokens: Tensor, size: Tensor | None) -> Tensor:
        """Pool and classify as timm does; an average is weighted by size."""
        if isinstance(self.vit.head, TokenAndAverage):
            logits: Tensor = self.vit.head(self.vit.head_drop(tokens), size)
            return logits
        if size is None or not self.is_averaging:
            logits = self.vit.forward_head(tokens)
            return logits
        first = 0 if self.vit.pool_include_prefix else self.n_protected
        pooled = weighted_average(tokens[:, first:], size[:, first:])
        logits = self.vit.head(self.vit.head_drop(self.vit.fc_norm(pooled)))
        return logits

    def _resolve(self, n_tokens: int) -> tuple[int, ...]:
        return resolve_schedule(
            self._requested,
            depth=len(self.vit.blocks),
            n_tokens=n_tokens,
            n_protected=self.n_protected,
            exhausted=self._exhausted,
        )


def _metric(choice: MetricChoice, seed: int) -> Metric:
    if isinstance(choice, str) and choice in METRICS:
        return METRICS[choice](seed)
    if not callable(choice):
        expected = ", ".join(map(repr, METRICS))
        raise ValueError(f"metric {choice!r}: expected {expected} or a Metric")
    return choice


def load_vit(
    architecture: str,
    *,
    weights: Literal["pretrained"] | Path | None = None,
    norm_eps: float | None = None,
    **timm_arguments: Any,
) -> nn.Module:
    """Build a timm vision transformer with random, pretrained or local weights.

    architecture, timm_arguments: for `timm.create_model` (img_size, num_classes, …). Two arguments
        are not timm's: norm_eps is that of all layer norms, and global_pool "token+avg" is DINOv2's
        classifier, see `TokenAndAverage`.
    Raises: UnsupportedArchitecture; ValueError for an unknown name; WeightsMismatch or
        FileNotFoundError for the file.
    """
    if isinstance(weights, str) and weights != "pretrained":
        raise ValueError(f"weights {weights!r}: expected None, 'pretrained' or the path of a safetensors file")
    if ":" not in architecture:  # hub and folder names do not reveal the family
        _check_name(architecture)
    has_token_and_average = timm_arguments.get("global_pool") == TOKEN_AND_AVERAGE
    if has_token_and_average:
        timm_arguments["global_pool"] = ""
    model: Any = timm.create_model(architecture, pretrained=weights == "pretrained", **timm_arguments)
    if has_token_and_average:
        model.head = TokenAndAverage(model)
    if norm_eps is not None:
        _set_norm_eps(model, norm_eps)
    check_model(model, architecture)
    if isinstance(weights, Path):
        load_weights(model, weights)
    return cast(nn.Module, model)


def _set_norm_eps(model: nn.Module, eps: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def outline(architecture: str, **timm_arguments: Any) -> nn.Module:
    """Return the model that `load_vit` builds, without memory for its tensors. Raises: as it."""
    return load_vit(architecture, **timm_arguments, device="meta", weight_init="skip")


def plain_names() -> Iterator[str]:
    """Return the names of timm's plain vision transformers, with those of other heads and blocks."""
    for name in timm.list_models():
        if timm.model_entrypoint(name).__module__.rpartition(".")[2] in ("vision_transformer", "deit"):
            yield name


def behaviour(vit: nn.Module) -> tuple[object, ...]:
    """Return what a forward pass depends on beside the tensors; equal for models that compute the same."""
    model: Any = vit
    names = ("global_pool", "no_embed_class", "pool_include_prefix", "num_prefix_tokens")
    return repr(model), model.patch_embed.img_size, model.blocks[0].attn.num_heads, *(getattr(model, n) for n in names)


def resample_positions(
    positions: Tensor, vit: nn.Module, *, old_grid: tuple[int, int], n_prefix: int, antialias: bool = True
) -> Tensor:
    """Return position embeddings of the model's grid. Shapes: (1, prefix + patches, C) -> the same"""
    model: Any = vit
    resampled: Tensor = resample_abs_pos_embed(
        positions, model.patch_embed.grid_size, old_grid, num_prefix_tokens=n_prefix, antialias=antialias
    )
    return resampled


def full_config(stated: dict[str, Any]) -> dict[str, Any]:
    """Return timm's `pretrained_cfg` with its defaults. Raises: TypeError for an unknown key"""
    return asdict(PretrainedCfg(**stated))


def _check_name(architecture: str) -> None:
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(
            f"timm {timm.__version__} has no architecture {architecture!r}"
            + (f"; like it: {', '.join(close)}" if close else "")
        )
    check_family(architecture, timm.model_entrypoint(architecture).__module__)
