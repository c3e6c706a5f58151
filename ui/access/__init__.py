"""Access: who may ask, within which limits, and the record of it."""
