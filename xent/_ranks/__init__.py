"""Classes spread over the ranks of a process group."""
