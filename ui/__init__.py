"""User interfaces: web page, HTTP API, command line and notebook."""
