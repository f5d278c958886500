"""The studies: variants of one recipe, trained equally long and evaluated alike.

Each addresses a question that the paper leaves open (arXiv 2412.10569). Findings are in
training/LOG.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from training.learn.recipe import AdamW, DtemRecipe
from training.merging.relaxed import Relaxation

N_IMAGES = 3_200
"""Images that each variant sees in training, unless the study varies it."""
RATES = (16, 24)
"""The rate of training, and one that leaves two tokens: at r = 16 alone, variants hardly differ."""
N_DISTINCT = 51_200
"""The full data, of which some variants use a share."""
_VIT = AdamW(learning_rate=(5e-5, 1e-6), weight_decay=0.05, clip_norm=1.0, warmup_images=320)

Variants = dict[str, DtemRecipe]


@dataclass(frozen=True)
class Study:
    """A question, the rates of evaluation, and the variants by name, made from the base recipe."""

    question: str
    rates: tuple[int, ...]
    vary: Callable[[DtemRecipe], Variants]


def _base(recipe: DtemRecipe) -> DtemRecipe:
    return replace(recipe, n_images=N_IMAGES, data=replace(recipe.data, n_distinct=N_DISTINCT))


def _soft(recipe: DtemRecipe, tau1: float = 0.1, tau2: float = 0.1) -> DtemRecipe:
    return replace(recipe, relaxation=replace(recipe.relaxation, tau1=tau1, tau2=tau2))


def _untrained(recipe: DtemRecipe) -> DtemRecipe:
    """Return the recipe with one step at learning rate 0, which keeps the initial embedding."""
    if recipe.embedding is None:
        raise ValueError("the recipe has no embedding: a study needs one")
    return replace(recipe, n_images=recipe.batch_size, embedding=replace(recipe.embedding, learning_rate=(0.0, 0.0)))


def _with_vit(recipe: DtemRecipe) -> DtemRecipe:
    return replace(recipe, mode="end-to-end", vit=_VIT)


def _generalisation(recipe: DtemRecipe) -> Variants:
    base = _base(recipe)
    return {
        "untrained": _untrained(base),
        "trained at r=16": base,
        "trained at r=8": replace(base, r=8),
        "r=16, d'=8": replace(base, dim=8),
        "r=16, tau 0.3": _soft(base, tau1=0.3, tau2=0.3),
    }


def _data(recipe: DtemRecipe) -> Variants:
    base = _base(recipe)
    shares = {"100 %": 1.0, "10 %": 0.1, "1 %": 0.01, "0.3 %": 0.003}
    variants = {"untrained": _untrained(base)}
    for text, share in shares.items():
        limited = replace(base, data=replace(base.data, n_distinct=round(N_DISTINCT * share)))
        variants[f"modular, {text}"] = limited
        variants[f"end-to-end, {text}"] = _with_vit(limited)
    fewer = replace(base, n_images=N_IMAGES // 5)
    variants[f"modular, {fewer.n_images} images seen"] = fewer
    variants[f"end-to-end, {fewer.n_images} images seen"] = _with_vit(fewer)
    return variants


def _temperatures(recipe: DtemRecipe) -> Variants:
    base = _base(recipe)
    values = (0.01, 1.0)
    variants = {"untrained": _untrained(base), "tau1 0.1, tau2 0.1": base}
    variants |= {f"tau1 {value}, tau2 0.1": _soft(base, tau1=value) for value in values}
    variants |= {f"tau1 0.1, tau2 {value}": _soft(base, tau2=value) for value in values}
    return variants


def _keys(recipe: DtemRecipe) -> Variants:
    base = _base(recipe)
    return {
        "embedding, untrained": _untrained(base),
        "embedding, modular": base,
        "embedding, end-to-end": _with_vit(base),
        "keys, hard merging": replace(base, mode="hard keys", embedding=None, vit=_VIT),
        "keys, soft merging": replace(base, mode="soft keys", embedding=None, vit=_VIT),
    }


def _relaxation(recipe: DtemRecipe) -> Variants:
    base = _base(recipe)
    return {
        "untrained": _untrained(base),
        "tail dropped": replace(base, keep_tail=False),
        "tail kept": replace(base, keep_tail=True),
        "1 partner": replace(base, relaxation=Relaxation(n_partners=1)),
        "8 partners": replace(base, relaxation=Relaxation(n_partners=8)),
    }


STUDIES = {
    "generalisation": Study(
        "Does an embedding trained at one rate work at every other, and do d' or the temperatures matter?",
        (2, 4, 8, 12, 16, 20, 24),
        _generalisation,
    ),
    "data": Study("How much data and how many steps are needed, modular and end-to-end?", RATES, _data),
    "temperatures": Study("How soft should grouping be: tau1 and tau2 over two decades?", RATES, _temperatures),
    "keys": Study("Is the decoupled embedding needed, or can the ViT's keys learn as well?", RATES, _keys),
    "relaxation": Study("Is the tail needed in training, and how many partners?", RATES, _relaxation),
}
