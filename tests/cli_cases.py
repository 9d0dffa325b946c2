"""Tiny checkpoints of every published kind, for tests of the command line."""

import torch

import audiomae
from audiomae.data import recordings

SMALL = {"width": 64, "depth": 2, "heads": 1, "mlp_ratio": 2.0}
DECODER = {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 16}
MAE_AST = {**SMALL, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 1}
SOUNDS = [
    path for path in recordings() if path.stem.endswith(("shutter", "message", "complete"))
]  # 0.3 to 1.1 s


def state_dict(kind):
    torch.manual_seed(0)
    if kind == "finetuned":
        model = audiomae.create_classifier("audiomae_small", 5, frames=64, **SMALL)
    else:
        name, fields = {
            "window": ("audiomae_small", {**SMALL, **DECODER, "frames": 64}),
            "global": ("audiomae_small", {**SMALL, **DECODER, "frames": 64, "decoder": "global"}),
            "encoder": ("audiomae_small", {**SMALL, "frames": 64, "decoder": "none"}),
            "ssast_patch": ("ssast_patch_tiny", {**SMALL, "frames": 64}),
            "ssast_frame": ("ssast_frame_tiny", {**SMALL, "frames": 64}),
            "mae_ast": ("mae_ast_patch_base", MAE_AST),
        }[kind]
        model = audiomae.create_model(name, **fields)
    state = audiomae.to_upstream(model)
    return {n: t[:, :300] if n.endswith("_sine_pos_embed.pe") else t for n, t in state.items()}


KINDS = {
    "window": ([], "Audio-MAE ", "loss "),
    "global": (["--raw-target"], "Audio-MAE ", "loss "),
    "encoder": ([], "Audio-MAE encoder ", "embedding "),
    "finetuned": ([], "Audio-MAE fine-tuned ", "logits "),
    "ssast_patch": ([], "SSAST ", "loss "),
    "ssast_frame": ([], "SSAST ", "loss "),
    "mae_ast": (["--tokens", "patch"], "MAE-AST ", "info_nce"),
}


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
