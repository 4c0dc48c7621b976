"""Failure handling: all ranks learn of the first failure, and every process exits."""
