"""Store: the catalog of an atlas and its feature files, the source of truth."""
