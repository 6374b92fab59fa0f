"""The meaning of keys and tensors by PEFT's rules, and whether they agree with the base."""
