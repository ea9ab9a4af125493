"""Faults brought about on purpose, and what a run makes of them; see docs/reliability.md for the results."""
