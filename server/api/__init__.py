"""The services, independent of the protocol: a call, its request and its answer. No gRPC."""
