"""Audits that are disturbed on purpose, and what of them is lost: for tests/cluster and benchmarks.chaos."""
