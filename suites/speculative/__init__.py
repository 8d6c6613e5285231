"""Speculative decoding: the judge of draft models."""
