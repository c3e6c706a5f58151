"""Care: checking, repairing and copying an atlas."""
