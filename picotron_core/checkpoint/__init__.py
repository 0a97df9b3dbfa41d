"""Saving a run's state whole, and reading it back."""
