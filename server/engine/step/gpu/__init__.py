"""Steps on a GPU: tables that stay there, captured steps, tokens drawn on the device."""
