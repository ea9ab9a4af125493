"""Faults on purpose, each seeded and repeatable, with the results as JSON."""
