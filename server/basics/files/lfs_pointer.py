"""Git LFS pointers: what a clone has in the place of a large file that was not fetched."""

from __future__ import annotations

_LFS_POINTER = b"version https://git-lfs"


def why_lfs_pointer(begin: bytes) -> str:
    """Why a file with this beginning is not what its name says; "" where it may be.

    Args:
        begin: As many of its first bytes as there are of a pointer's, or all.
    """
    if not begin.startswith(_LFS_POINTER[: max(8, len(begin))]):
        return ""
    return "is a Git LFS pointer, not the file itself: `git lfs pull` in the clone fetches it"
