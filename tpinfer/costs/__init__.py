"""What every op of a step costs, counted once."""
