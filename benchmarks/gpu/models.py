"""ViTs with random weights, and images to go with them: nothing that is timed here depends on their values."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.size import Architecture
from training.data.preprocessing import InputRule
from training.merging import AttentionForm
from training.models.classifier import ServedClassifier
from training.models.vit import MergingVisionTransformer, load_vit

_DETAILS = (4, 14, 56, 112)  # sides of the grids of noise that an image is made of
_JPEG_QUALITY = 90


def make_vit(architecture: Architecture) -> nn.Module:
    """Build a model with timm's own random weights, the same at every call."""
    torch.manual_seed(0)
    return load_vit(architecture.timm_name, **architecture.arguments).eval()


def draw_pixels(n_images: int, rule: InputRule, seed: int = 0) -> Tensor:
    """Draw blurred noise, coarse and fine, so that tokens differ as clearly as those of photographs.

    Shapes: uint8 (n, H, W, 3)
    """
    generator = torch.Generator().manual_seed(seed)
    side = (rule.height, rule.width)
    image = torch.zeros(n_images, 3, *side)
    for detail in _DETAILS:
        noise = torch.randn(n_images, 3, detail, detail, generator=generator)
        image += functional.interpolate(noise, size=side, mode="bilinear")
    return (image * 32 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def encode_jpegs(pixels: Tensor, rule: InputRule) -> list[bytes]:
    """Encode images enlarged a little, so that the service has to shrink and crop them as it would photographs."""
    return [_encode_jpeg(image, rule) for image in pixels]


def _encode_jpeg(pixels: Tensor, rule: InputRule) -> bytes:
    resized = rule.resize_shorter_side or max(rule.resize_height or 0, rule.resize_width or 0)
    side, buffer = resized + 8, io.BytesIO()
    image = Image.fromarray(pixels.numpy()).resize((side * 4 // 3, side))
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


@dataclass
class RandomImages:
    """Drawn images as a labelled source, for an exporter that measures accuracy on one. The labels mean nothing."""

    pixels: Tensor
    n_classes: int
    name: str = "random-noise"
    split: str = "none"
    licence: str = "none needed"
    credits: tuple[str, ...] = ("drawn by benchmarks.gpu",)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(str(index) for index in range(self.n_classes))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], index % self.n_classes


class HalfClassifier(nn.Module):
    """The served classifier in half precision: normalised in float32, then all weights and tokens of one dtype."""

    def __init__(self, served: ServedClassifier, dtype: torch.dtype) -> None:
        super().__init__()
        self.served, self.dtype = served, dtype
        self.served.model.to(dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """Shapes: uint8 (B, H, W, 3) -> float32 (B, classes)"""
        logits: Tensor = self.served.model(self.served.normalised(pixels).to(self.dtype))
        return logits.float()


def make_classifier(
    vit: nn.Module, rule: InputRule, r: int, precision: str = "float32", attention: AttentionForm = "plain"
) -> nn.Module:
    """Wrap a ViT at a rate as it is exported, or with another form of attention; half precision changes the ViT too.

    precision: float32, float16 or bfloat16
    """
    model = MergingVisionTransformer(vit, r, exhausted="reduce", attention=attention)
    served = ServedClassifier(model, rule).eval()
    return served if precision == "float32" else HalfClassifier(served, getattr(torch, precision)).eval()
