"""Methods that any classifier can be distilled with."""
