"""What makes mlx-lm's server answer behind a context, safely."""
