"""Overload: which share of requests gets a correct answer in time beyond the capacity at r = 0?"""
