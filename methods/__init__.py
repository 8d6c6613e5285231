"""Reference implementations, one file a method: ``methods/<problem>/<slug>.py``."""
