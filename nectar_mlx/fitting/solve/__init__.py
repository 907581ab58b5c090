"""How heads are solved for: initialization, regression, quantization-aware rounding."""
