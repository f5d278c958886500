"""Embedding: what does DTEM's embedding cost over ToMe at the same rate?"""
