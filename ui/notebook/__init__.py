"""Notebook: the atlas in Python, with paths and images in any common form."""
