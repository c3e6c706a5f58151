"""Session: the answers that page and API share."""
