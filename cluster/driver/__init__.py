"""The driver: every decision about groups, tasks and commits, without Ray."""
