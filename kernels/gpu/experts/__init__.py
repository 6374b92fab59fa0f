"""Mixtures of experts: who goes where, the experts' products, and their sum."""
