"""Relaxed: what does a training step through relaxed merging cost?"""
