"""One call: what it carries, its tries, and how its answer comes, whole or as a stream."""
