"""Measurements of a model: held-out bits per byte; long-context tests come here."""
