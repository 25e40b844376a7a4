"""Files to tokens to micro-batches: read, validate, tokenize, order, pack, cut."""
