"""Training of a small network that finds tissue on overviews of slides."""
