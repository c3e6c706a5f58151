"""Exchange: features of other tools, exports for other tools, Milvus."""
