"""Disturb real trainings and commands in every way that happens to them, and check that nothing is lost."""
