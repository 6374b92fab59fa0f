"""How many connections a door keeps: few enough that there are descriptors left for files."""

from __future__ import annotations

import resource

# Of one door. Each costs a descriptor and, over TLS, some tens of kilobytes.
MOST_CONNECTIONS = 4096
# Descriptors that no connection takes: files of adapters and uploads, the log, the model.
RESERVED_DESCRIPTORS = 512
# Who runs a server with fewer descriptors than are reserved gets one that answers still.
_LEAST_CONNECTIONS = 16


def most_connections(num_doors: int) -> int:
    """The bound of each of ``num_doors`` doors; what comes beyond it is closed at once.

    All doors together leave ``RESERVED_DESCRIPTORS``. The process's soft limit of descriptors is
    raised for that, as far as the hard one allows.
    """
    wanted = num_doors * MOST_CONNECTIONS + RESERVED_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    share = (soft - RESERVED_DESCRIPTORS) // num_doors
    return max(min(share, MOST_CONNECTIONS), _LEAST_CONNECTIONS)
