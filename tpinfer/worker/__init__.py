"""One rank at work."""
