"""What an adapter_config.json may say, and which modules it means."""
