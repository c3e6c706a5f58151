"""Index: the atlas of embeddings, its clusters, and the search for similar cases."""
