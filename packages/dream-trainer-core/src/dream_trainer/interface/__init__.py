"""What callbacks may rely on: the trainer that they are attached to, and intersections of types."""
