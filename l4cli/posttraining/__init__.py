"""Rollouts, judges and difficulty pools of post-training live here; none is built yet."""
