"""One run from start to end: planned, built, supervised, checkpointed, resumed."""
