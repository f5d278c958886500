"""Graphs: how fast is each graph of a version, without the service?"""
