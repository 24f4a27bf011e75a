"""From anybody's recording to the one event model."""
