"""Descriptors: how many files and sockets the process may have open."""

import resource

# The process's own: the store, logs, threads, traces.
RESERVED = 256


def allow_descriptors(wanted: int) -> int:
    """Raise the soft limit to `wanted` and RESERVED more, as far as the hard limit allows.

    Returns: how many of the wanted descriptors there are; half of the limit where that is low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    possible = wanted + RESERVED if hard == resource.RLIM_INFINITY else min(hard, wanted + RESERVED)
    limit = max(soft, possible)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return min(wanted, max(limit - RESERVED, limit // 2))
