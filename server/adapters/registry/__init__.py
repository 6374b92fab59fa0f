"""Names and generations: loads, replaces, pins and unloads adapters, and resolves their names."""
