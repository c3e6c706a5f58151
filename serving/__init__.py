"""Serving: slides and tile sets through an encoder, into one feature file each."""
