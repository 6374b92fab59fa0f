"""gRPC: listeners, interceptor, servicers, status."""
