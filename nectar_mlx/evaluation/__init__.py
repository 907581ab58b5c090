"""How close a file is to the full cache, and how to show it."""
