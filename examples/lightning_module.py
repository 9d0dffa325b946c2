"""Pre-training under Lightning: python examples/lightning_module.py FOLDER_OF_RECORDINGS"""

import sys

import lightning
import torch

import audiomae
from audiomae.data import ClipDataset, ClipSampler, make_loader, open_source


class Pretraining(lightning.LightningModule):
    def __init__(self, folder, name="audiomae_small", batch_size=8, workers=2, **overrides):
        super().__init__()
        self.model, self.workers = audiomae.create_model(name, **overrides), workers
        self.sources = [open_source(folder)]
        self.sampler = ClipSampler(self.sources, batch_size=batch_size)

    def train_dataloader(self):
        return make_loader(ClipDataset(self.sources, self.model.config.frontend), self.sampler, self.workers)

    def training_step(self, batch, index):
        spectrogram = self.model.config.frontend(batch.waveform, batch.lengths)
        out = self.model(spectrogram)  # draws its own mask
        self.log_dict({"loss": out.loss, **out.losses}, batch_size=len(batch), prog_bar=True)
        return out.loss

    def on_train_batch_end(self, outputs, batch, index):
        self.sampler.advance()  # other crops and another order in the next epoch

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4)


if __name__ == "__main__":
    module = Pretraining(sys.argv[1])
    lightning.Trainer(max_epochs=3, default_root_dir="runs/lightning").fit(module)
    module.model.save_pretrained("runs/lightning/model")
