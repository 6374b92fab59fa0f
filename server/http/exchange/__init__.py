"""One request over HTTP: connection, limits, authorisation, the answer or error."""
