"""Files of a checkpoint directory: how they are written."""
