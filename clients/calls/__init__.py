"""One call: what it sends, its retries, and its answer, complete or as a stream."""
