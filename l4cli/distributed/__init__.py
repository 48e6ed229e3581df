"""Sharding applied to a model from outside; with one rank nothing is applied."""
