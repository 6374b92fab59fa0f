"""Bearer tokens with roles, and which role each service asks for."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from turret.server.api.tokens import TokenTable
from turret.server.errors import PermissionDeniedError, UnauthenticatedError

_log = logging.getLogger(__name__)


# Services that are not listed (health, reflection) are open: they tell nothing about the content.
SERVICE_ROLES = {"turret.v1.Inference": "inference", "turret.v1.Adapters": "admin"}


def authorize(
    tokens: TokenTable | None, method: str, metadata: Iterable[tuple[str, str | bytes]]
) -> None:
    """Let a call pass, or raise.

    Args:
        tokens: The accepted tokens; None accepts every caller.
        method: ``/package.Service/Method``.
        metadata: The call's metadata; the token is ``authorization: Bearer TOKEN``.

    Raises:
        UnauthenticatedError: No token, or an unknown one.
        PermissionDeniedError: The token lacks the service's role.
    """
    service = method.split("/")[1] if method.count("/") == 2 else ""
    role = SERVICE_ROLES.get(service)
    if tokens is None or role is None:
        return
    header = next((value for key, value in metadata if key == "authorization"), None)
    if not isinstance(header, str):
        raise UnauthenticatedError("the call carries no 'authorization: Bearer TOKEN' metadata")
    scheme, _, token = header.partition(" ")
    roles = tokens.roles_of(token.strip()) if scheme.lower() == "bearer" else None
    if roles is None:
        raise UnauthenticatedError("the token is unknown")
    if role not in roles:
        raise PermissionDeniedError(
            f"{service} needs a token with the role {role!r}",
            metadata={"service": service, "role": role},
        )
