"""Fitting heads that stand for what is not read exactly, and the keys beside them."""
