"""Exchange: import of other tools' features, export for other tools, Milvus."""
