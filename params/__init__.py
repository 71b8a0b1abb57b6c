"""WHAT a run is: typed sections, presets, and the command that writes params.yaml.

Imports nothing of ours.
"""
