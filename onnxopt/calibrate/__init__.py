"""Statistics streamed from running a model on data."""
