"""Search: the questions that one committed state of an atlas answers."""
