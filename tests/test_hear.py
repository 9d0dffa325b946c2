"""The interface that HEAR's evaluation kit calls, against its specification (https://hearbenchmark.com/hear-api.html)."""

import pytest
import torch

import audiomae
from audiomae import hear

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"width": 32, "heads": 2, "depth": 2}
NAMES = {
    "audiomae_base": {"decoder": "none"},
    "mae_ast_frame_base": {"decoder": "none"},
    "ssast_patch_tiny": {},
}


@pytest.fixture(params=NAMES)
def model(request, tmp_path):
    audiomae.create_model(request.param, **SMALL | NAMES[request.param]).save_pretrained(tmp_path)
    return hear.load_model(str(tmp_path))


def test_what_the_specification_asks_of_a_model(model):
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate == 16000  # one of the rates in which the tasks come
    assert type(model.scene_embedding_size) is int and type(model.timestamp_embedding_size) is int
    assert model.to("cpu") is model


# Those of the kit's validator, one frame, and one beyond the model's positions.
@pytest.mark.parametrize("seconds", [0.025, 1.07, 1.98, 4.0, 11.3])
def test_timestamp_embeddings(model, seconds):
    audio = 2 * torch.rand(2, int(seconds * model.sample_rate)) - 1
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.dtype == timestamps.dtype == torch.float32
    assert embeddings.shape == (2, timestamps.shape[1], 32) and timestamps.shape[0] == 2
    assert embeddings.isfinite().all() and torch.equal(timestamps[0], timestamps[1])
    # Regular, at most 50 ms apart, and over all of the clip.
    hop = model.hop_ms
    assert hop == (20.0 if model.step_ms == 20.0 else 50.0)
    assert torch.equal(timestamps[0], torch.arange(timestamps.shape[1]) * hop)
    assert 1000 * seconds - hop < timestamps[0, -1] <= 1000 * seconds


def test_scene_embeddings(model):
    audio = 2 * torch.rand(4, int(2.74 * model.sample_rate)) - 1
    scenes = hear.get_scene_embeddings(audio, model)
    assert scenes.shape == (4, model.scene_embedding_size) and scenes.dtype == torch.float32
    torch.testing.assert_close(
        scenes, torch.stack([hear.get_scene_embeddings(x[None], model)[0] for x in audio])
    )
    torch.testing.assert_close(scenes, audiomae.Embedder(model.model)(audio))


def test_timestamps_are_where_things_happen(model):
    """At the middle of a time step, the embedding is that step's; between two, it lies between."""
    audio = torch.randn(1, 32000) / 9
    frames, times = model(audio)[0], model.times(3)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    for i, moment in enumerate(timestamps[0, :8].tolist()):
        place = min(max(0.0, (moment - times[0].item()) / model.step_ms), len(frames) - 1)
        first = int(place)
        expected = frames[first] + (place - first) * (frames[min(first + 1, len(frames) - 1)] - frames[first])
        torch.testing.assert_close(embeddings[0, i], expected, rtol=1e-4, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="no weights come with this package"):
        hear.load_model()  # as the kit calls it without --model
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        hear.load_model("/nowhere/model.pt")
    model = hear.load_model("ssast_frame_tiny", depth=2, layer=1)
    assert model.layer == 1
    with pytest.raises(ValueError, match="mono"):
        hear.get_scene_embeddings(torch.zeros(16000), model)
    with pytest.raises(ValueError, match="fewer than one frame"):
        hear.get_timestamp_embeddings(torch.zeros(2, 100), model)
