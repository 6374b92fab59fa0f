"""The course of a call: what it sends, its retries, and its answer, whole or as a stream."""
