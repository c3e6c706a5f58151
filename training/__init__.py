"""Training: one readable recipe per paper, from labelled tiles to a run folder."""
