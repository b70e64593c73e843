"""Demonstration set: procedurally drawn, captioned scenes in webdataset tar shards.

Every caption determines its scene and every scene is drawn from a seed, so the set needs no
download, is the same on every machine, and a small model learns it in minutes.
"""

from packer.demo.draw import draw_image, encode_jpeg
from packer.demo.scene import Scene, SceneObject, draw_caption, draw_scene
from packer.demo.write import DemoPaths, DemoSettings, ensure_demo, make_demo

__all__ = [
    "DemoPaths",
    "DemoSettings",
    "Scene",
    "SceneObject",
    "draw_caption",
    "draw_image",
    "draw_scene",
    "encode_jpeg",
    "ensure_demo",
    "make_demo",
]
