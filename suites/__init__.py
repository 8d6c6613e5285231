"""Suites: a card, a problem and a judge each."""
