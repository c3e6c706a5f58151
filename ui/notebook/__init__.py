"""Notebook: the atlas in Python, with paths and images as they come."""
