"""Reading a rank's share of a checkpoint."""
