"""turret: many adapters of many methods on one 4-bit base model, served over gRPC."""

__version__ = "0.1.0"
