"""Rows of logits on one device: the formula of the loss, its Functions and operators, the choice of a backend."""
