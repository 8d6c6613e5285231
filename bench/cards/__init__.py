"""Cards: their types, how they are read, where they are found, and skeletons of new ones."""
