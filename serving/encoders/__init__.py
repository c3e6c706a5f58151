"""Encoders: turn tiles into embeddings, in this process or on Triton."""
