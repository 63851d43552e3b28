"""Checks of the files that start a cluster."""
