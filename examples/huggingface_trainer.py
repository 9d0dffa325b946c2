"""Fine-tuning by Hugging Face's Trainer: python examples/huggingface_trainer.py FOLDER_OF_CLASS_FOLDERS [WEIGHTS]"""

import sys
from pathlib import Path

from transformers import Trainer, TrainingArguments

import audiomae
from audiomae.data import load_audio, open_source


class Clips:
    def __init__(self, folder, frontend):
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.clips = [(clip.path, i) for i, name in enumerate(names) for clip in open_source(folder / name)]
        self.names, self.frontend = names, frontend

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        path, label = self.clips[index]
        return {"spectrogram": self.frontend(load_audio(path)), "labels": label}


def train(folder, weights=None, out="runs/huggingface", settings=None, **overrides):
    clips = Clips(Path(folder), audiomae.Frontend.named("esc50"))  # 512 frames, AudioSet's is "audioset"
    options = {"frontend": clips.frontend, "frames": 512, "pretrained": weights, **overrides}
    model = audiomae.create_classifier("audiomae_small", len(clips.names), **options)
    arguments = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-4} | (
        settings or {}
    )
    trainer = Trainer(model, TrainingArguments(out, **arguments), train_dataset=clips, eval_dataset=clips)
    trainer.train()
    model.save_pretrained(Path(out) / "model")
    return trainer


if __name__ == "__main__":
    train(*sys.argv[1:3])
