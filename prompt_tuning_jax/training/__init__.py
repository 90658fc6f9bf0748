"""Training the leaves that a labelling names, and nothing else."""
