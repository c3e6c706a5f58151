"""Slides: opening whole slides, finding tissue, reading tiles."""
