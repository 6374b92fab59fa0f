"""Who may call, and how much at once: tokens and roles, shares of one party, connections."""
