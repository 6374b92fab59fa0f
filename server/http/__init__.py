"""HTTP: the OpenAI-compatible door, on Starlette and uvicorn."""
