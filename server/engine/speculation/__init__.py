"""Draft tokens: guessed from text, checked several in one step. No torch, no second model."""
