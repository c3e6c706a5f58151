"""API: the HTTP API and its client."""
