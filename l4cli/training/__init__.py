"""The one loop and what it is given: optimizers, schedules, balance, objectives."""
