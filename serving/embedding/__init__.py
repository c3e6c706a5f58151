"""Embedding: many slides and tile sets through an encoder, into feature files."""
