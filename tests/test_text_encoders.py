"""T5 and CLIP: the originals' results, released folders, tokens, and what is wrong with a folder in one line."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters
from tiny_text import CLIP, LETTERS, T5, clip_folder, clip_tokenizer, t5_folder, t5_tokenizer

from mg import runtime
from mg.checkpoints import CheckpointError, StateDict, read_state_dict, write_state_dict
from mg.text import create_text_encoder
from mg.text.clip import CLIPTextTower, pooled_positions
from mg.text.t5 import T5Encoder, relative_position_buckets
from mg.text.tokenizers import open_tokenizer

DATA = Path(__file__).parent / "data" / "text"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {"t5": t5_folder(folder / "t5"), "clip": clip_folder(folder / "clip")}


def original(kind: str, network):
    """A network with the original's weights, and an array of its data by name."""
    config = json.loads((DATA / kind / "meta.json").read_text())["config"]
    arrays = {path.stem: np.load(path) for path in (DATA / kind).glob("*.npy")}
    ids = arrays["input_ids"].astype(np.int32)
    built = network({key: value for key, value in config.items() if key in network.default_config}, ids.shape[1])
    weights = read_state_dict(DATA / kind / "weights.safetensors")
    parameters = dict(built.parameters_and_names())
    assert set(parameters) == set(weights)
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(weights[name]))
    return built, Tensor(ids), arrays


def test_t5_gives_what_the_original_gives_in_both_modes(mode):
    network, ids, data = original("t5", T5Encoder)
    states = network(ids, Tensor(data["attention_mask"].astype(np.float32))).asnumpy()
    np.testing.assert_allclose(states, data["last_hidden_state"], rtol=0, atol=2e-5)
    if mode == "pynative":
        np.testing.assert_array_equal(network.position_bias().asnumpy(), data["position_bias"])


def test_clip_gives_what_the_original_gives_in_both_modes(mode):
    network, ids, data = original("clip", CLIPTextTower)
    states = network(ids).asnumpy()
    np.testing.assert_allclose(states, data["last_hidden_state"], rtol=0, atol=2e-5)
    pooled = states[np.arange(3), pooled_positions(data["input_ids"], 2)]
    np.testing.assert_allclose(pooled, data["pooled"], rtol=0, atol=2e-5)


def test_the_pooled_state_is_at_the_first_end_token():
    ids = np.array([[7, 3, 9, 9, 9], [7, 9, 2, 9, 9]])
    assert pooled_positions(ids, 2).tolist() == pooled_positions(ids, 9).tolist() == [2, 1]
    assert pooled_positions(ids, 3)[0] == 1


@pytest.mark.parametrize(
    "kind, network, count", [("t5", T5Encoder, 4_762_310_656), ("clip", CLIPTextTower, 63_165_952)]
)
def test_the_default_is_the_released_model_by_name_and_shape(kind, network, count):
    with no_init_parameters():
        parameters = dict(network({}, 8).parameters_and_names())
    lines = [line.split(" ", 1) for line in (DATA / f"{kind}_names.txt").read_text().splitlines()]
    assert {name: str(tuple(p.shape)) for name, p in parameters.items()} == dict(lines)
    assert sum(p.size for p in parameters.values()) == count


def test_far_tokens_share_a_bucket_and_very_far_ones_the_last():
    buckets = relative_position_buckets(300, 32, 128)
    assert buckets[299, 299 - np.array([0, 7, 8, 11, 12, 16, 32, 64, 127, 128, 299])].tolist() == (
        [0, 7, 8, 8, 9, 10, 12, 14, 15, 15, 15]
    )
    assert (buckets[0, 1:] == buckets[1:, 0] + 16).all()


# Encoders of folders.


def test_a_prompt_depends_on_no_other_and_rows_after_it_are_zeros(folders):
    encoder = create_text_encoder("t5", folders["t5"], model_max_length=12)
    assert (encoder.type, encoder.output_dim, encoder.model_max_length) == ("t5", 16, 12)
    prompts = ["a cat", "", "a dog, 2 cats and 17 more dogs"]
    y, mask = encoder.encode(prompts)
    assert y.shape == (3, 1, 12, 16) and y.dtype == np.float32 and mask.dtype == bool
    assert mask.sum(1).tolist() == [4, 1, 12]
    assert not y[:, 0][~mask].any() and np.abs(y[:, 0][mask]).min(axis=-1).all()
    np.testing.assert_array_equal(encoder.encode(prompts[:1])[0][0], y[0])
    longer, _ = create_text_encoder("t5", folders["t5"], model_max_length=20).encode(prompts[:1])
    np.testing.assert_allclose(longer[0, 0, :4], y[0, 0, :4], rtol=0, atol=1e-5)  # padding is not seen


def test_clip_gives_one_vector_and_no_mask(folders):
    encoder = create_text_encoder("clip", folders["clip"])
    y, mask = encoder.encode(["a cat", "a dog"])
    assert y.shape == (2, 1, 1, 16) and mask is None and encoder.model_max_length == 77
    assert np.abs(y[0] - y[1]).max() > 0.1
    shorter, _ = create_text_encoder("clip", folders["clip"], 16).encode(["a cat"])
    np.testing.assert_allclose(shorter[0], y[0], rtol=0, atol=1e-5)


def test_classes_are_numbers():
    encoder = create_text_encoder("classes", num_classes=10)
    y, mask = encoder.encode(["3", " 10"])
    assert y.tolist() == [3, 10] and mask is None and encoder.num_classes == 10
    with pytest.raises(ValueError, match="the prompt is 'cat'; it must be a class number, 0 to 9, or 10"):
        encoder.encode(["3", "cat"])


@pytest.mark.parametrize("dtype, bound", [("fp16", 5e-3), ("bf16", 4e-2)])
@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_products_and_their_weights_are_in_low_precision_and_the_rest_is_not(folders, kind, dtype, bound):
    low, full = (create_text_encoder(kind, folders[kind], 16, precision) for precision in (dtype, "fp32"))
    found, wanted = low.encode(["a cat and a dog"])[0], full.encode(["a cat and a dog"])[0]
    assert 0 < np.abs(found - wanted).max() < bound * np.abs(wanted).max()
    kept = {name: p.dtype for name, p in low.network.parameters_and_names()}
    norms_and_tables = [name for name in kept if any(part in name for part in ("norm", "embedding", "shared", "bias"))]
    in_fp32 = [name for name in kept if kept[name] == runtime.PRECISIONS["fp32"]]
    # The last product of T5's feed-forward layers leaves the range of fp16.
    wide = [name for name in kept if name.endswith("wo.weight") and dtype == "fp16"]
    assert sorted(in_fp32) == sorted(norms_and_tables + wide)
    assert all(kept[name] == runtime.PRECISIONS[dtype] for name in kept if name not in in_fp32)


def test_weights_are_read_one_by_one(folders, monkeypatch):
    alive, most = weakref.WeakSet(), []
    read = StateDict.__getitem__

    class Array(np.ndarray):
        """One that can be seen to go."""

    def watched(self, name):
        array = read(self, name).view(Array)
        alive.add(array)
        most.append(len(alive))
        return array

    # WeakSet asks for hashes, which arrays do not have.
    monkeypatch.setattr(Array, "__hash__", object.__hash__, raising=False)
    monkeypatch.setattr(Array, "__eq__", object.__eq__, raising=False)
    monkeypatch.setattr(StateDict, "__getitem__", watched)
    create_text_encoder("t5", folders["t5"], 8)
    assert len(most) == 21 and max(most) == 1


def test_a_whole_model_in_shards_with_its_tokenizer_is_read(folders, tmp_path):
    weights = read_state_dict(folders["t5"])
    wanted = create_text_encoder("t5", folders["t5"], 8).encode(["a cat"])[0]
    weights = {name: value for name, value in weights.items() if name != "shared.weight"} | {
        "encoder.embed_tokens.weight": weights["shared.weight"],  # its other name
        "decoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((8, 16), np.float32),
        "lm_head.weight": np.zeros((96, 16), np.float32),
    }
    place, shards = tmp_path / "pipeline" / "text_encoder", {}
    place.mkdir(parents=True)
    for number in (1, 2):
        names = sorted(weights)[number - 1 :: 2]
        write_state_dict(place / f"model-{number:05d}-of-00002.safetensors", {name: weights[name] for name in names})
        shards |= dict.fromkeys(names, f"model-{number:05d}-of-00002.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (place / "config.json").write_text((folders["t5"] / "config.json").read_text())
    t5_tokenizer(tmp_path / "pipeline" / "tokenizer")
    for path in (tmp_path / "pipeline", place):
        np.testing.assert_array_equal(create_text_encoder("t5", path, 8).encode(["a cat"])[0], wanted)


def test_a_config_that_names_no_feed_forward_is_of_version_1_0(tmp_path):
    folder = t5_folder(tmp_path, feed_forward_proj="relu")
    config = json.loads((folder / "config.json").read_text())
    del config["feed_forward_proj"], config["relative_attention_max_distance"]
    (folder / "config.json").write_text(json.dumps(config))
    encoder = create_text_encoder("t5", folder, 8)
    assert encoder.config["feed_forward_proj"] == "relu"
    assert np.isfinite(encoder.encode(["a cat"])[0]).all()


def test_without_weights_they_are_random_and_the_tokenizer_is_given(tmp_path):
    t5_tokenizer(tmp_path)
    y, _ = create_text_encoder("t5", None, 8, tokenizer=tmp_path, **T5).encode(["a cat"])
    assert y.shape == (1, 1, 8, 16) and np.abs(y).max() > 0.1
    clip_tokenizer(tmp_path)
    y, _ = create_text_encoder("clip", None, 8, tokenizer=tmp_path / "vocab.json", **CLIP).encode(["a cat"])
    assert y.shape == (1, 1, 1, 16)


# What is wrong, in one line.


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(type="bert"), "the text encoder's type is 'bert'; it must be one of t5, clip, classes"),
        (dict(type="t5"), "needs from_pretrained, or at least a tokenizer"),
        (dict(type="t5", model_max_length=1, tokenizer="x"), "model_max_length is 1; it must be at least 2"),
        (dict(type="t5", from_pretrained="DeepFloyd/t5-v1_1-xxl"), "get DeepFloyd/t5-v1_1-xxl from Hugging Face"),
        (dict(type="t5", tokenizer="{t5}", d_modl=8), "t5 has no config key 'd_modl'; did you mean 'd_model'"),
        (dict(type="t5", tokenizer="{t5}", feed_forward_proj="tanh"), "feed_forward_proj is tanh; it must be one of"),
        (dict(type="t5", tokenizer="{t5}", num_heads=0), "t5: num_heads is 0; it must be a whole number above 0"),
        (dict(type="t5", tokenizer="{t5}", relative_attention_num_buckets=2), "buckets is 2; it must be at least 4"),
        (dict(type="t5", tokenizer="{t5}", relative_attention_max_distance=8), "distance is 8; it must be above 8"),
        (dict(type="clip", from_pretrained="{clip}", num_attention_heads=3), "a multiple of num_attention_heads, 3"),
        (
            dict(type="clip", from_pretrained="{clip}", model_max_length=78),
            "model_max_length is 78; CLIP takes 2 to 77",
        ),
        (dict(type="clip", from_pretrained="{clip}", hidden_act="relu"), "clip: hidden_act is relu; it must be one of"),
        (
            dict(type="t5", from_pretrained="{clip}", tokenizer="{t5}"),
            "a model of type 'clip'; .* of t5 or mt5",
        ),
        (
            dict(type="t5", from_pretrained="{t5}", num_layers=3),
            "does not fit this text encoder: .* missing ",
        ),
        (
            dict(type="t5", tokenizer="{t5}", **{**T5, "vocab_size": 9}),
            "has 47 tokens and the text encoder 9",
        ),
    ],
)
def test_wrong_settings_are_named(folders, arguments, said):
    for key in ("from_pretrained", "tokenizer"):
        if key in arguments:
            arguments[key] = str(arguments[key]).format(**folders)
    with pytest.raises(ValueError, match=said) as error:
        create_text_encoder(**arguments)
    assert "\n" not in str(error.value)


def test_a_stored_config_that_cannot_be_built_is_named_with_its_file(tmp_path):
    folder = t5_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": -1, "use_cache": True}))
    with pytest.raises(CheckpointError, match=r"config.json: t5: layer_norm_epsilon is -1; it must be above 0"):
        create_text_encoder("t5", folder, 8)
    create_text_encoder("t5", folder, 8, layer_norm_epsilon=1e-6)


def test_weights_that_are_not_finite_are_refused(folders, tmp_path):
    folder = t5_folder(tmp_path)
    weights = read_state_dict(folder)
    weights["encoder.final_layer_norm.weight"][3] = np.nan
    write_state_dict(folder / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match="final_layer_norm.weight .* NaN"):
        create_text_encoder("t5", folder, 8)


def test_what_a_prompt_is_encoded_to_has_to_be_finite(folders):
    encoder = create_text_encoder("t5", folders["t5"], 8)
    parameters = dict(encoder.network.parameters_and_names())
    parameters["encoder.final_layer_norm.weight"].set_data(Tensor(np.full(16, np.inf, np.float32)))
    with pytest.raises(ValueError, match="the embedding of 'a cat' is not finite"):
        encoder.encode(["a cat"])


# Tokens.


def test_a_text_is_cut_so_that_it_ends_with_the_end_token_and_filled_up(tmp_path):
    t5_tokenizer(tmp_path)
    tokenizer = open_tokenizer("t5", tmp_path)
    ids, used = tokenizer("a cat", 6)
    assert (ids.tolist(), used) == ([4, 3, 5, 1, 0, 0], 4) and ids.dtype == np.int32
    assert tokenizer("a cat", 3).ids.tolist() == [4, 3, 1]
    assert tokenizer("", 3).ids.tolist() == [1, 0, 0]
    assert 2 in tokenizer("ü \ud800", 8).ids


def test_clip_tokens_of_a_vocabulary_are_those_of_its_tokenizer_file(tmp_path):
    clip_tokenizer(tmp_path / "vocabulary")
    tokenizer = open_tokenizer("clip", tmp_path / "vocabulary")
    end, letters = len(LETTERS) * 2 + 3, {letter: number for number, letter in enumerate(LETTERS)}
    cat, dog = len(LETTERS) * 2 + 1, [letters["d"], letters["o"], letters["g"] + len(LETTERS)]
    found = tokenizer("  A CAT,\n dog", 12)
    a, comma = (letters[letter] + len(LETTERS) for letter in "a,")
    assert found.ids.tolist() == [end - 1, a, cat, comma, *dog, end, end, end, end, end] and found.used == 8
    assert tokenizer("a cat dog", 4).ids.tolist() == [end - 1, a, cat, end]


def test_sentencepiece_gives_the_tokens_of_the_tokenizer_file(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import Unigram

    texts = ["a cat sits on the mat", "the dog runs after a cat", "cats and dogs, 17 of them", "a red car in the rain"]
    (tmp_path / "texts.txt").write_text("\n".join(texts * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=30, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    ours = open_tokenizer("t5", tmp_path)
    backend = Tokenizer(Unigram(pieces, unk_id=2))
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    backend.save(str(tmp_path / "tokenizer.json"))
    other = open_tokenizer("t5", tmp_path)
    assert (ours.file.name, other.file.name) == ("spiece.model", "tokenizer.json") and ours.size == other.size == 30
    for text in [*texts, "", "a", "the cats run,  17"]:
        for length in (4, 40):
            assert ours(text, length).ids.tolist() == other(text, length).ids.tolist()


@pytest.mark.parametrize(
    "kind, wanted", [("t5", "tokenizer.json or spiece.model"), ("clip", "vocab.json with merges.txt")]
)
def test_a_tokenizer_that_is_missing_unreadable_or_needs_a_package_is_named(tmp_path, monkeypatch, kind, wanted):
    with pytest.raises(ValueError, match=f"there is no tokenizer; put .*{wanted}"):
        open_tokenizer(kind, tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=f"tokenizer.json: not a tokenizer for {kind} that can be read") as error:
        open_tokenizer(kind, file)
    assert "\n" not in str(error.value)
    monkeypatch.setattr("mg.text.tokenizers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="reading it needs the tokenizers package: pip install tokenizers"):
        open_tokenizer(kind, tmp_path)


# The transformers package itself, where it is installed.


@pytest.mark.full
@pytest.mark.parametrize("proj, buckets", [("gated-gelu", 32), ("relu", 16), ("gated-silu", 32), ("gelu", 64)])
def test_t5_gives_what_transformers_gives(tmp_path, proj, buckets):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    t5_tokenizer(tmp_path)
    torch.manual_seed(1)
    names = dict(feed_forward_proj=proj, relative_attention_num_buckets=buckets, relative_attention_max_distance=100)
    model = transformers.T5EncoderModel(transformers.T5Config(**{**T5, **names})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    encoder = create_text_encoder("t5", tmp_path, 200)
    ids, used = encoder.tokenizer("a cat and a dog", 200)
    with torch.no_grad():
        inputs = torch.tensor(ids[None].astype(np.int64)), torch.tensor(np.arange(200)[None] < used).long()
        wanted = model(input_ids=inputs[0], attention_mask=inputs[1]).last_hidden_state.numpy()
    y, _ = encoder.encode(["a cat and a dog"])
    np.testing.assert_allclose(y[0, 0, :used], wanted[0, :used], rtol=0, atol=1e-4 * np.abs(wanted).max())
    states = {f"encoder.{name}": value for name, value in model.encoder.state_dict().items()}
    halves = list(states)[::2], list(states)[1::2]  # and as older releases lie there
    for path in tmp_path.glob("model*"):
        path.unlink()
    for number, half in enumerate(halves):
        torch.save({name: states[name] for name in half}, tmp_path / f"pytorch_model-{number}.bin")
    where = {name: f"pytorch_model-{number}.bin" for number, half in enumerate(halves) for name in half}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    np.testing.assert_array_equal(create_text_encoder("t5", tmp_path, 200).encode(["a cat and a dog"])[0], y)


@pytest.mark.full
def test_buckets_are_those_of_transformers():
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    position = torch.arange(600)
    for buckets, distance in ((32, 128), (64, 256), (16, 100), (40, 128)):
        wanted = bucket(position[None, :] - position[:, None], True, buckets, distance).numpy()
        np.testing.assert_array_equal(relative_position_buckets(600, buckets, distance), wanted)


@pytest.mark.full
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_gives_what_transformers_gives(tmp_path, act):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    clip_tokenizer(tmp_path)
    torch.manual_seed(1)
    end = 2 * len(LETTERS) + 3
    marks = dict(bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
    config = transformers.CLIPTextConfig(**{**CLIP, "vocab_size": end + 1, "hidden_act": act, **marks})
    model = transformers.CLIPTextModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(tmp_path)
    encoder = create_text_encoder("clip", tmp_path)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    prompts = ["A cat, don't!", "  a  dog\n17 cats ...!?", "", "x" * 200]
    for prompt in prompts:
        theirs = tokenizer(prompt, max_length=77, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert encoder.tokenizer(prompt, 77).ids.tolist() == theirs[0].tolist()
        with torch.no_grad():
            wanted = model(input_ids=theirs).pooler_output.numpy()
        y, _ = encoder.encode([prompt])
        np.testing.assert_allclose(y[0, 0], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
