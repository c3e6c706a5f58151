"""Artifacts: the files that the stages exchange, and how they are read and written."""
