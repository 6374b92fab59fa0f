"""HTTP: the OpenAI-compatible API, on Starlette and uvicorn."""
