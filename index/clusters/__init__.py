"""Clusters: fitting, storing and reporting clusterings."""
