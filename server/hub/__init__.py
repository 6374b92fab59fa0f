"""The Hugging Face hub: its repositories, and the copies of their files on this machine."""
