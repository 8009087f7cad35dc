"""Masks to look at: `palette` has colours, overlays and palette PNGs, `report` the HTML page of a run.

The room imports NumPy, Pillow and Jinja2, and nothing of the house.
"""
