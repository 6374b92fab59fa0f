"""The Inference service: reads the request's messages, runs them, and builds the answers."""
