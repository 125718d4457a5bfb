"""Cameras, images, masks: what was seen of a subject, and from where."""
