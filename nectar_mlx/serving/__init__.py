"""The HTTP server: one thread computes (`engine`), the event loop speaks HTTP (`app`); validated values go between."""
