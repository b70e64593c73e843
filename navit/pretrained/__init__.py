"""Public weights, both ways and without loss: SigLIP (2) and CLIP of transformers, timm, FlexiViT.

A source is a folder as ``save_pretrained`` writes it, an id on the hub (where there is a network),
a model object, or a state dict with its configuration; it is only read. A checkpoint's image
gives the vector it gives in its own library, packed with other images of any size:

    from navit.pretrained import load_siglip2_clip, save_siglip2_clip
    from packer import PackerConfig, PackingCollator

    model = load_siglip2_clip("google/siglip2-base-patch16-naflex").eval()
    config = PackerConfig(patch_size=16, seq_len=1024, max_tokens=256, resize="fill_budget")
    batch = PackingCollator(config)([{"image": image} for image in images])
    vectors = model.encode_image(batch, normalize=True)  # (N, D), in the order of the images
    save_siglip2_clip(model, "for-transformers")  # Siglip2Model.from_pretrained reads it

FlexiViT comes as big_vision's .npz (`load_flexivit`: flexible, weights and positions as they were
trained) or as timm's conversion of it to patches of 16 pixels on 240 (`load_timm_vit`: fixed, and
flexible by ``.flexible()``, from weights that were resized once already).

`load` reads any of them, and our own folders, by what config.json says. Weights keep their types:
those of a float16 checkpoint are float16. A tensor that is missing, or that no rule knows, is an
error that lists it; only a tower that is not asked for, a classifier, and constants that old files
store (``position_ids``) are passed over.
"""

from navit.pretrained.clip import load_clip, load_clip_clip, save_clip, save_clip_clip
from navit.pretrained.flexivit import load_flexivit, save_flexivit
from navit.pretrained.load import load
from navit.pretrained.siglip import (
    load_siglip,
    load_siglip2,
    load_siglip2_clip,
    load_siglip_clip,
    save_siglip,
    save_siglip2,
    save_siglip2_clip,
    save_siglip_clip,
)
from navit.pretrained.timm import load_timm_vit, save_timm_vit

__all__ = [
    "load",
    "load_clip",
    "load_clip_clip",
    "load_flexivit",
    "load_siglip",
    "load_siglip2",
    "load_siglip2_clip",
    "load_siglip_clip",
    "load_timm_vit",
    "save_clip",
    "save_clip_clip",
    "save_flexivit",
    "save_siglip",
    "save_siglip2",
    "save_siglip2_clip",
    "save_siglip_clip",
    "save_timm_vit",
]
