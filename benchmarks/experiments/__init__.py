"""A folder for each experiment."""
