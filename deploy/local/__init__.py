"""The service on this machine, as a process or as the Compose stack. For tests and benchmarks."""
