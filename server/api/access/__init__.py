"""Who may call, and how much at once: tokens, roles, shares of callers, connections."""
