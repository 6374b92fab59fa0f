"""Which files have which digest, so that an adapter that is read again is not hashed again.

A file is known by what the system says of it: device, inode, size, and the times of its last change
of content and of itself. Writing to a file moves the latter, which no program can set back; writing
to a mapping of it may not, so only files that nobody else can open for writing belong here. A file
that changed just before it was read is not remembered: a second change within the same tick of the
clock would not show.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict

# Seconds that a file must have been unchanged before it was read; some network file systems keep
# times in whole seconds.
_SETTLED_SECONDS = 3.0
_MAX_ENTRIES = 1 << 16


def stamp_of(*descriptors: int) -> bytes | None:
    """Names the present state of open files, 16 bytes; None if one changed just now."""
    told = []
    for descriptor in descriptors:
        s = os.fstat(descriptor)
        # This also rejects times in the future, which mean that a clock is wrong.
        if not 0 <= s.st_ctime <= time.time() - _SETTLED_SECONDS:
            return None
        told.append((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
    return hashlib.blake2b(repr(told).encode(), digest_size=16).digest()


class DigestCache:
    """Digests by stamp, the last ``max_entries`` of them. Thread-safe."""

    def __init__(self, max_entries: int = _MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._digests: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, stamp: bytes | None) -> str | None:
        """The digest of files with this stamp, if it is known."""
        with self._lock:
            if stamp not in self._digests:
                return None
            self._digests.move_to_end(stamp)
            return self._digests[stamp]

    def remember(self, stamp: bytes | None, digest: str) -> None:
        """Call it with a stamp taken before the files were read."""
        if stamp is None:
            return
        with self._lock:
            self._digests[stamp] = digest
            self._digests.move_to_end(stamp)
            if len(self._digests) > self._max_entries:
                self._digests.popitem(last=False)
