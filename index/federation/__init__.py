"""Several atlases of one encoder, searched as one: shards on disk or in Milvus, asked at the same time."""
