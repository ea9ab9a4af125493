"""Backends behind one protocol: the loop tells facts, the engine chooses mechanisms."""
