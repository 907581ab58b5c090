"""From a text to its heads: questions and answers, captured attention, and the regression."""
