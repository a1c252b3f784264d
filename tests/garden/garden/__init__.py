"""A Vision Transformer that testreg does not know, and the row that tells it."""
