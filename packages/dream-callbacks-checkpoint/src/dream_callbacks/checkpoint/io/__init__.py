"""File systems: protocol, two implementations, directory lock, atomic commit."""
