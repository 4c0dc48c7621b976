"""The files of a checkpoint: their names, the manifest, the index of tensors, state as JSON."""
