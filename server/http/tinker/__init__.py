"""The Tinker API (``/api/v1``), which trains adapters on the base model that is served."""
