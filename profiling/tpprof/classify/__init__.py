"""What each piece of recorded work is, what it should cost and which ceiling bounds it."""
