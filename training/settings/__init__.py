"""What a person who trains can set, and what is filled in."""
