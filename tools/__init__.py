"""What builds, checks and measures the packages; standard library only."""
