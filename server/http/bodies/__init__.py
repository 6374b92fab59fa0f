"""The bodies of requests and answers, field by field."""
