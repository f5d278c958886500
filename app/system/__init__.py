"""System: limits and memory of the process, as Linux and its C library have them."""
