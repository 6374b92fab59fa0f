"""The admin calls: load, replace, upload, fuse, merge, pin, unload, list."""
