"""Fused attention operators of files, read and written out in standard operators: a file for each operator."""
