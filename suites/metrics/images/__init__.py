"""Metrics of image sets: distances between feature distributions, coverage, copies, diversity, and the networks that make features."""
