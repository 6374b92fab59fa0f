"""The Tinker API: trains adapters on the base model that serves (``/api/v1``)."""
