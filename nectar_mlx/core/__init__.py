"""What everything else is built on: attention as (o, L), the device, quantisation, entropy coding, files, progress."""
