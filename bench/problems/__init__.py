"""What a suite hands to a method: typed, frozen dataclasses, one file per kind of problem."""
