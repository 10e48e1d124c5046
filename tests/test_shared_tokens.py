"""A network whose tokens two workers share has the outputs of one worker; on the CPU, by msrun."""

from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from shared_tokens import CASES
from workers import run

from mg.collectives import Group
from mg.diffusion.networks import create_denoiser, sequence
from mg.runtime import Runtime

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two workers of shared_tokens.py have left."""
    folder = tmp_path_factory.mktemp("ranks")
    run(folder, FOLDER / "shared_tokens.py", 900)
    return [np.load(folder / f"rank_{rank}.npz") for rank in (0, 1)]


@pytest.mark.full
@pytest.mark.parametrize("case, mode", CASES)
def test_outputs_and_gradients_are_those_of_one_worker(ranks, case, mode):
    """Of 12, 15 and 16 patches, with captions of several lengths and given frames; one with gradient checkpointing."""
    names = [name for name in ranks[0] if name.startswith(f"{case}/{mode}/alone/")]
    assert len(names) > 40
    for name in names:
        wanted = ranks[0][name]
        for rank in ranks:
            found = rank[name.replace("/alone/", "/shared/")]
            assert np.abs(found - wanted).max() <= 1e-5 * max(np.abs(wanted).max(), 1e-3), name


# In one process.


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_have_all_patches_between_them(monkeypatch, workers):
    """As many each, and zeros behind the last."""
    monkeypatch.setattr(sequence, "AllGather", lambda group: None)
    x = np.arange(1, 121, dtype=np.float32).reshape(2, 3, 5, 4)
    groups = [Group.of(Runtime("cpu", rank, workers)) for rank in range(workers)]
    parts = [sequence.SharedTokens(group).own(Tensor(x)).asnumpy() for group in groups]
    assert len({part.shape for part in parts}) == 1
    whole = np.concatenate(parts, axis=2)
    np.testing.assert_array_equal(whole[:, :, :5], x)
    assert whole.shape[2] - 5 < workers and not whole[:, :, 5:].any()


@pytest.mark.parametrize("name", ["stdit", "stdit2", "stdit3"])
def test_only_attention_within_frames_communicates(monkeypatch, name):
    monkeypatch.setattr(sequence, "AllGather", lambda group: None)
    network = create_denoiser(name, depth=2, hidden_size=24, num_heads=2, caption_channels=8, model_max_length=4)
    network.share_tokens(Group(0, 2, 0, 2))
    sharing = [at for at, cell in network.cells_and_names() if isinstance(cell, sequence.SharedTokens)]
    blocks = "spatial_blocks" if name == "stdit3" else "blocks"
    assert sharing == ["tokens", f"{blocks}.0.attn.tokens", f"{blocks}.1.attn.tokens"]


def test_a_network_without_frames_cannot_share_tokens():
    network = create_denoiser("dit", depth=1, hidden_size=24, num_heads=2)
    with pytest.raises(ValueError, match="dit has no tokens that 2 workers could share; use an STDiT"):
        network.share_tokens(Group(0, 2, 0, 2))
