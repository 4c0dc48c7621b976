"""Import paths of dream-trainer 1.x, kept for compatibility."""
