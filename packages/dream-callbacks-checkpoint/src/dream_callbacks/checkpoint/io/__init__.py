"""File systems: the protocol and its two implementations, the lock, the atomic commit."""
