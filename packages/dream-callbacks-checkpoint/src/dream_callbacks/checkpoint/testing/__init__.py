"""Tests of resuming: a run that was killed and resumed is compared with one that never stopped."""
