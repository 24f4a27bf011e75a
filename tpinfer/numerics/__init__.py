"""Number formats as torch sees them."""
