"""Benchmarks: one folder per question, `python -m benchmarks.<folder> --help`.

In each, `__main__` has the options, `measure` the measurement and `report` its table and figure.
`load` has the clients and their images, `servers` the model stores and settings of the servers.
"""
