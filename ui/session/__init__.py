"""Session: the functions that the page and the API share."""
