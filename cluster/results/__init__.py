"""Committing what tasks measured, and reducing it to tables."""
