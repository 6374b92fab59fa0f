"""Constraints on answers, which llguidance compiles and follows token by token."""
