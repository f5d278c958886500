"""Overhead: what does the service cost over the bare model?"""
