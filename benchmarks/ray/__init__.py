"""Ray: what does a Ray cluster cost over a single process?"""
