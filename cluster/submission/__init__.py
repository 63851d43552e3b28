"""Taking an audit to a cluster as a job."""
