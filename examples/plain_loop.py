"""A classifier on a pre-trained encoder in a plain PyTorch loop. python examples/plain_loop.py FOLDER [WEIGHTS]

FOLDER holds a folder of recordings for each class. WEIGHTS is a folder, a published checkpoint or a hub id.
"""

import sys
from dataclasses import replace

import torch
from torch.utils.data import DataLoader

import audiomae
from audiomae.data import labelled_folder, load_batch


def train(folder, weights=None, epochs=3, **overrides):
    source = labelled_folder(folder)
    clips, names = [(clip.path, clip.labels[0]) for clip in source], source.label_names
    model = audiomae.create_classifier(
        "audiomae_small", num_classes=len(names), frames=512, pretrained=weights, drop_path=0.1, **overrides
    )
    model.config.frontend = replace(model.config.frontend, labels=names)  # saved with the weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    loader = DataLoader(
        clips, batch_size=8, shuffle=True, collate_fn=lambda rows: tuple(zip(*rows, strict=True))
    )
    for epoch in range(epochs):
        for paths, labels in loader:
            waveform, lengths = load_batch(paths, model.config.frontend)
            spectrogram = model.config.frontend(waveform, lengths)  # (B, 512, 128), on the waveform's device
            out = model(spectrogram, labels=torch.tensor(labels))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {out.loss.item():.4f}")
    return model


if __name__ == "__main__":
    train(*sys.argv[1:]).save_pretrained("runs/plain_loop")  # audiomae tag CLIP --model runs/plain_loop
