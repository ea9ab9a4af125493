"""Watching over the ranks of a run: hangs, deaths, signals. Needs the standard library alone."""
