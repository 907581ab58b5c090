"""Helpers stand here, tests where what they test stands in nectar_mlx/."""
