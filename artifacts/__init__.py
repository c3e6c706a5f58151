"""Artifacts: what the stages hand to each other, and how it is read and written."""
