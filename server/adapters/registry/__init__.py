"""Names and generations: load, replace, pin, unload, resolve for requests."""
