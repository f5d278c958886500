"""HTTP/1.1: a connection of our own under uvicorn, with bounds in bytes and time. llhttp parses the heads."""
