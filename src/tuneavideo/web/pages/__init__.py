"""Addresses of clips and of runs.

clip.py      a clip: its frames, its caption, the request of a tuning or a preview
run.py       a run: its edits, masks, exports, pushes to the hub
forms.py     form fields, from the settings' descriptions and bounds
estimate.py  time and memory of a tuning before it starts
"""
