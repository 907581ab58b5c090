"""What everything else is built on: attention as (o, L), the device, quantization, entropy coding, files, progress."""
