"""Life of worker processes. Nothing in here is imported by a process that only dispatches."""
