"""What keys and tensors mean by PEFT's rules, and whether they agree with the base."""
