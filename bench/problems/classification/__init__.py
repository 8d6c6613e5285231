"""Classification: images or vectors with one of C classes."""

VERSION = 1  # raised when results of this kind of problem may change: part of every identity
