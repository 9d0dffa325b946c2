"""Fine-tuning by Hugging Face's Trainer: python examples/huggingface_trainer.py FOLDER_OF_CLASS_FOLDERS [WEIGHTS]"""

import sys
from dataclasses import replace
from pathlib import Path

from transformers import Trainer, TrainingArguments

import audiomae
from audiomae.data import labelled_folder, load_audio


class Clips:
    def __init__(self, folder, frontend):
        self.clips = labelled_folder(folder)
        self.frontend = replace(frontend, labels=self.clips.label_names)  # saved with the weights

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        clip = self.clips[index]
        return {"spectrogram": self.frontend(load_audio(clip.path)), "labels": clip.labels[0]}


def train(folder, weights=None, out="runs/huggingface", settings=None, **overrides):
    clips = Clips(folder, audiomae.Frontend.named("esc50"))  # 512 frames, AudioSet's is "audioset"
    options = {"frontend": clips.frontend, "frames": 512, "pretrained": weights, **overrides}
    model = audiomae.create_classifier("audiomae_small", len(clips.frontend.labels), **options)
    arguments = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-4} | (
        settings or {}
    )
    trainer = Trainer(model, TrainingArguments(out, **arguments), train_dataset=clips, eval_dataset=clips)
    trainer.train()
    model.save_pretrained(Path(out) / "model")
    return trainer


if __name__ == "__main__":
    train(*sys.argv[1:3])
