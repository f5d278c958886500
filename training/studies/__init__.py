"""Studies: experiments on the questions that the paper leaves open.

Commands: `python -m training.studies.study` and `python -m training.studies.background`.
Findings are in training/LOG.md.
"""
