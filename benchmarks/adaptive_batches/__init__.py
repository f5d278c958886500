"""Adaptive batches: what do images with different numbers of tokens cost in one batch?"""
