"""The server's limit on ranks."""

from __future__ import annotations

from turret.server.errors import BudgetExceededError


def check_rank(path: str, rank: int, max_rank: int | None, *, name: str = "rank") -> None:
    """Refuses a rank over the server's limit; ``name`` is what the message calls it.

    Raises:
        BudgetExceededError: It is over.
    """
    if max_rank is not None and rank > max_rank:
        raise BudgetExceededError(
            f"adapter {path!r} has {name} {rank}, the server allows {max_rank};"
            f" `turret serve --max-rank {rank}` allows it",
            metadata={"path": path, name: str(rank), "max_rank": str(max_rank)},
        )
