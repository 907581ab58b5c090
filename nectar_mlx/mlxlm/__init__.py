"""The seam to mlx-lm: routing its attention, caches that start behind a context, prompts, the window."""
