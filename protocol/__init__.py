"""What the Blender extension and the compute backend share: recipes, messages, the client. Nothing here imports bpy, torch or numpy."""

VERSION = "0.1.0"  # of Kiln as a whole; the wire protocol has a version of its own in messages.py
