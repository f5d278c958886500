"""Soak test: does the service keep every promise under mixed traffic and reloads?"""
