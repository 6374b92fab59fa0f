"""Bearer tokens with roles, and which role each service asks for."""

from __future__ import annotations

from turret.server.api.access.tokens import ROLES, TokenTable, bearer_token
from turret.server.errors import PermissionDeniedError, UnauthenticatedError

# Services that are not listed (health, reflection) are open: they tell nothing about the content.
SERVICE_ROLES = {
    "turret.v1.Inference": "inference",
    "turret.v1.Adapters": "admin",
    # No service of turret.v1: a door may serve the metrics too.
    "metrics": "metrics",
}


def authorize(tokens: TokenTable | None, service: str, authorization: object) -> None:
    """Let a call pass, or raise.

    Args:
        tokens: The accepted tokens; None accepts every caller.
        service: Full name of the service that is called, a key of ``SERVICE_ROLES``. A door that
            has no services names the one that does the same.
        authorization: What the client sent as ``authorization``: ``Bearer TOKEN``. Anything but a
            string is as good as nothing.

    Raises:
        UnauthenticatedError: No token, or an unknown one.
        PermissionDeniedError: The token lacks the service's role.
    """
    role = SERVICE_ROLES.get(service)
    if role is None:
        return
    if role not in roles_of(tokens, authorization):
        raise PermissionDeniedError(
            f"this needs a token with the role {role!r}: one whose line in the server's token file"
            " names that role",
            metadata={"service": service, "role": role},
        )


def roles_of(tokens: TokenTable | None, authorization: object) -> frozenset[str]:
    """The roles of a caller; arguments as for ``authorize``.

    Raises:
        UnauthenticatedError: No token, or an unknown one.
    """
    if tokens is None:
        return frozenset(ROLES)
    if not isinstance(authorization, str):
        raise UnauthenticatedError("the call carries no 'authorization: Bearer TOKEN'")
    token = bearer_token(authorization)
    if token is None:
        # What was sent may be a token, and is not repeated.
        raise UnauthenticatedError("'authorization' does not have the form 'Bearer TOKEN'")
    roles = tokens.roles_of(token)
    if roles is None:
        raise UnauthenticatedError("the token is unknown")
    return roles
