"""What a suite hands to a method: typed, frozen dataclasses, one file a kind of problem."""
