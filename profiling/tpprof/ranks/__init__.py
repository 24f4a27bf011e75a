"""What only several ranks together can tell: clocks, matched collectives, waits."""
