"""What `nectar bench` measures."""
