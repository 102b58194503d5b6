"""A linear head with its loss: rows of logits that exist for one block at a time."""
