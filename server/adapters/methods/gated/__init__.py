"""Methods that weigh other adapters, token by token."""
