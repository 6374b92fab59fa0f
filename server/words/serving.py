"""What the server, its model, its engine and its disk cannot do."""

TEXTS: dict[str, str] = {
    "PRELOAD_FAILED": "--preload {name}={path}: {problem}",
    "SHUTTING_DOWN": "the server is shutting down",
    "LFS_POINTER": "is a Git LFS pointer instead of the file; run `git lfs pull` in the clone",
}
