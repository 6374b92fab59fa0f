"""``turret verify``: compares the answers of any OpenAI-compatible server with those of PEFT."""
