"""Verification: is a rewritten model valid, does it run, and how far did it move?"""
