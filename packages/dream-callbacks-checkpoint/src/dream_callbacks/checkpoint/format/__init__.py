"""File format of a checkpoint: file names, manifest, tensor index, state as JSON."""
