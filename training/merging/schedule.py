"""Schedules: the number of tokens that each block removes.

Source: arXiv 2210.09461, section 3 (constant and decreasing schedules).
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, TypeAlias

Schedule: TypeAlias = int | tuple[int, float] | Sequence[int]
"""`r` for every block; `(r, inflection)`, linear around a mean of `r`; or one `r` per block.

A tuple of two is always `(r, inflection)`. For a model of two blocks, give the rates as a list.
"""

Exhausted: TypeAlias = Literal["error", "reduce"]


def max_r(n_tokens: int, n_protected: int = 1) -> int:
    """Return the maximum r of one bipartite matching: half of the unprotected tokens."""
    return max(0, n_tokens - n_protected) // 2


def resolve_schedule(
    schedule: Schedule, *, depth: int, n_tokens: int, n_protected: int = 1, exhausted: Exhausted = "error"
) -> tuple[int, ...]:
    """Return the number of tokens that each of `depth` blocks removes.

    exhausted: what to do where a block's `r` exceeds `max_r`: raise an "error", or "reduce" it to
        `max_r` in the returned list (16 over 197 tokens and 12 blocks: eleven 16s and a 10).
    Raises: TypeError or ValueError for a malformed schedule; ValueError naming the block whose `r`
        is too large.
    Differs from the paper: its code reduces silently.
    """
    _check_sizes(depth, n_tokens, n_protected)
    if exhausted not in ("error", "reduce"):
        raise ValueError(f"exhausted must be 'error' or 'reduce', not {exhausted!r}")
    resolved: list[int] = []
    for block, r in enumerate(_rates(schedule, depth)):
        limit = max_r(n_tokens, n_protected)
        if r > limit and exhausted == "error":
            raise ValueError(
                f"block {block} cannot remove r={r} tokens: of the {n_tokens} that reach it ({n_protected} protected) "
                f"it can remove {limit}; exhausted='reduce' would use {limit}"
            )
        resolved.append(min(r, limit))
        n_tokens -= resolved[-1]
    return tuple(resolved)


def tokens_per_block(resolved: Sequence[int], n_tokens: int) -> tuple[int, ...]:
    """Return the number of tokens before each block and at the end: one more than there are blocks."""
    tokens = [n_tokens]
    for r in resolved:
        tokens.append(tokens[-1] - r)
    return tuple(tokens)


def _rates(schedule: Schedule, depth: int) -> list[int]:
    """Return one `r` per block, not yet checked against the number of tokens."""
    if isinstance(schedule, int):
        return [_rate(schedule)] * depth
    if isinstance(schedule, str | bytes) or not isinstance(schedule, Sequence):
        raise TypeError(f"schedule {schedule!r}: expected r, (r, inflection) or a list of one r per block")
    if isinstance(schedule, tuple) and len(schedule) == 2:
        return _linear(_rate(schedule[0]), schedule[1], depth)
    if len(schedule) != depth:
        raise ValueError(f"schedule {schedule!r}: a list of one r per block needs {depth} of them, not {len(schedule)}")
    return [_rate(r) for r in schedule]


def _linear(r: int, inflection: float, depth: int) -> list[int]:
    """Return rates on a line with mean `r`: -1 falls from 2r to 0, 0 is flat, +1 rises to 2r.

    Computed with fractions: floats would give 25.999… instead of 26 at some depths.
    """
    if isinstance(inflection, bool) or not isinstance(inflection, int | float):
        raise TypeError(f"inflection {inflection!r}: expected a number from -1 to 1")
    if not -1 <= inflection <= 1:
        raise ValueError(f"inflection {inflection!r}: expected a number from -1 to 1")
    if depth == 1:
        return [r]
    first = r * (1 - Fraction(str(inflection))) // 1
    return [first + (2 * r - 2 * first) * block // (depth - 1) for block in range(depth)]


def _rate(r: object) -> int:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r {r!r}: expected a whole number of tokens")
    if r < 0:
        raise ValueError(f"r {r}: expected a number of tokens of at least 0")
    return r


def _check_sizes(depth: int, n_tokens: int, n_protected: int) -> None:
    if depth < 1 or n_tokens < 1:
        raise ValueError(f"a schedule needs at least one block and one token, not {depth} and {n_tokens}")
    if not 0 <= n_protected <= n_tokens:
        raise ValueError(f"n_protected must be from 0 to the {n_tokens} tokens, not {n_protected}")
