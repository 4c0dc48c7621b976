"""The parts of `tools/gpu`, one module each; `runner` runs them, `part` records what they find."""
