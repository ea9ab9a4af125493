"""What a job costs, from its spec alone."""
