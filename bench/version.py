"""The version, on the ground floor: a module that states it need not import the package's door above all rooms."""

VERSION = "0.1.0"  # pyproject.toml says the same
