"""Studies of an atlas: retrieval quality, near-duplicates and leakage between splits."""
