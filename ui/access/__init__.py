"""Access: authentication, roles, limits, and the audit log."""
