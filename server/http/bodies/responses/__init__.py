"""Bodies of /v1/responses: what is asked, the conversation, and the items of the answer."""
