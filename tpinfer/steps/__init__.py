"""What crosses from rank 0 to every rank."""
