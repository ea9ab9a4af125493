"""Saving and restoring the state of training: one format for every backend and every number of ranks."""
