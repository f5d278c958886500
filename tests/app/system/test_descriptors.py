import resource

import pytest

from app.system.descriptors import allow_descriptors

INFINITY = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "raised_to"),
    [
        (1024, 1_048_576, 4096, 4352),
        (1024, INFINITY, 4096, 4352),
        (INFINITY, INFINITY, 4096, INFINITY),
        (65536, 65536, 4096, 65536),
        (1024, 1024, 768, 1024),
        (200, 256, 128, 256),
    ],
)
def test_limit_is_raised_as_far_as_it_may(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, allowed: int, raised_to: int
) -> None:
    limits: list[tuple[int, int]] = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.append(new))
    assert allow_descriptors(4096) == allowed
    assert limits[-1] == (raised_to, hard)
