"""The control plane, whoever asks: load, replace, upload, fuse, merge, pin, unload, list."""
