"""The Hugging Face hub: what it has, and its files on this machine."""
