"""Sizing: what does the Compose stack carry on a machine?"""
