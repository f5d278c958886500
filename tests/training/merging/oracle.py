"""Bipartite soft matching by its definition, one token at a time: a slow but simple oracle."""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def groups(metric: Array, r: int, n_protected: int) -> list[list[int]]:
    """Return the tokens of each group of one image, in the order of the result."""
    free = range(n_protected, len(metric))
    a, b = [i for i in free if i % 2 == 0], [i for i in free if i % 2 == 1]
    partner, best = {}, {}
    for i in a:
        similarity = [_cosine(metric[i], metric[j]) for j in b]
        best[i] = max(similarity, default=-np.inf)
        partner[i] = b[similarity.index(best[i])] if b else -1
    merged = sorted(a, key=lambda i: (-best[i], i))[:r]
    result = [[i] for i in range(n_protected)] + [[i] for i in a if i not in merged]
    return result + [[j] + [i for i in merged if partner[i] == j] for j in b]


def adaptive_groups(
    metric: Array, size: Array, threshold: float, split: str, score: str, n_protected: int
) -> list[list[int]]:
    """Return the same where every pair merges that scores above the threshold."""
    free = list(range(n_protected, len(metric)))
    if len(free) < 2:
        return [[i] for i in range(len(metric))]
    if split == "alternating":
        a, b = [i for i in free if i % 2 == 0], [i for i in free if i % 2 == 1]
    else:
        rising = sorted(free, key=lambda i: (size[i], i))
        a, b = rising[: len(free) // 2], rising[len(free) // 2 :][::-1]
    partner = {}
    for i in a:
        scores = [_score(metric, size, i, j, score) for j in b]
        if max(scores) > threshold:
            partner[i] = b[scores.index(max(scores))]
    result = [[i] for i in range(n_protected)] + [[i] for i in a if i not in partner]
    return result + [[j] + [i for i in a if partner.get(i) == j] for j in b]


def _score(metric: Array, size: Array, i: int, j: int, score: str) -> float:
    similarity = _cosine(metric[i], metric[j])
    if score == "similarity":
        return similarity
    return 1 - 2 * float(size[i] * size[j] / (size[i] + size[j])) * (1 - similarity)


def merge_mean(x: Array, size: Array, parts: list[list[int]]) -> tuple[Array, Array]:
    """Return the size-weighted mean of each group, and its size."""
    rows, sizes = [], []
    for group in parts:
        total = sum(size[i] for i in group)
        rows.append(sum(size[i] * x[i] for i in group) / total)
        sizes.append(total)
    return np.array(rows), np.array(sizes)


def _cosine(u: Array, v: Array) -> float:
    return sum(float(a * b) for a, b in zip(u, v, strict=True)) / (_norm(u) * _norm(v))


def _norm(u: Array) -> float:
    return math.sqrt(sum(float(a * a) for a in u))
