"""Methods of this package."""
