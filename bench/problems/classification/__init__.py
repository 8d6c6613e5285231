"""Classification: images or vectors with one of C classes."""
