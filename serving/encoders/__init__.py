"""Encoders: tiles to embeddings, in process or on Triton."""
