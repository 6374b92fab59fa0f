"""Many replicas as one server: a registry that alone decides, and replicas that follow it."""
