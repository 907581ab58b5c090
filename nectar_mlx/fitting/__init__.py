"""From a text to its heads: what the model is asked, what attention saw, and the regression."""
