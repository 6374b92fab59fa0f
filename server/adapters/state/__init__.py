"""The data that survives a restart: registrations and uploaded files in --state-dir."""
