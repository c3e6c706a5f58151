"""Embedding: turns slides and tile sets into feature files."""
