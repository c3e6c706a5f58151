"""Search: answers questions about one committed state of an atlas."""
