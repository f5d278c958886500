"""Overhead: what does the service cost over the model alone?"""
