"""Models that the toolkit builds itself, and what a backend must know to build any model."""
