"""Failing ranks: the first failure is known to all, and every process ends."""
