"""One leaf for every piece of a wall interval."""
