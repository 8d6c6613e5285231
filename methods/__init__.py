"""Reference implementations, one file per method: ``methods/<problem>/<slug>.py``."""
