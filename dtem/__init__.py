"""The command `dtem`: serve a model, or export, learn, calibrate, evaluate and compare models.

It declares the options of every command without importing either half, so that `--help` is quick. A command imports
`app` or `training` once it runs.
"""
