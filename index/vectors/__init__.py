"""Vectors: the FAISS index of an atlas, derived from its feature files."""
