"""The allowed content of adapter_config.json, and the modules that it selects."""
