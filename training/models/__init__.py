"""The model that is trained on: found, loaded, and made to fit into memory."""
