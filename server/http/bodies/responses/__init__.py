"""Bodies of /v1/responses: the request, the conversation, and the items of the answer."""
