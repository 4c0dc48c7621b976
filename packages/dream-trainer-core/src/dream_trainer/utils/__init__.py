"""Names that dream-trainer 1.x had here."""
