"""What users write for mg-generate: prompts, mask strategies, sizes, names; and one line where they write it wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from mg.config import parse_config
from mg.data.aspects import RATIOS, frame_count, image_size
from mg.generation.config import DenoiserSection, GenerateConfig, SchedulerSection, TextEncoderSection, check_paths
from mg.generation.masks import apply_mask_strategy, continuation, nearest_point, parse_mask_strategy
from mg.generation.requests import check_names, read_requests, sample_name
from mg.text.prompts import append_scores, split_loops, split_suffix

DATA = Path(__file__).parent / "data" / "generation"
PROMPTS = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))
STRATEGIES = json.loads((DATA / "mask_strategies.json").read_text(encoding="utf-8"))
SIZE = ["--image-size", "240", "426"]


def parse(*argv: str) -> GenerateConfig:
    return parse_config(GenerateConfig, "Generate.", list(argv))


# Prompts, against the originals.


@pytest.mark.parametrize("prompt, wanted", PROMPTS["json_suffix"].items())
def test_the_json_after_a_prompt(prompt, wanted):
    if "error" in wanted:
        with pytest.raises(ValueError, match="JSON after a prompt"):
            split_suffix(prompt)
    else:
        parts = split_suffix(prompt)
        assert (parts.text, parts.reference_path, parts.mask_strategy) == tuple(wanted.values())


@pytest.mark.parametrize("suffix", ['{"reference_path": 3}', '{"mask_strategy": ["0"]}', "{", "{}{}", "{0}"])
def test_json_of_another_kind_is_one_line(suffix):
    with pytest.raises(ValueError) as error:
        split_suffix(f"a cat{suffix}")
    assert "\n" not in str(error.value) and "JSON after a prompt" in str(error.value)


@pytest.mark.parametrize("case", PROMPTS["loops"])
def test_the_texts_of_loops(case):
    if case["prompt"].startswith("|1|"):  # the originals take the whole line for a text
        with pytest.raises(ValueError, match=r"start with \|0\|"):
            split_loops(case["prompt"], case["loop"])
    else:
        assert split_loops(case["prompt"], case["loop"]) == case["v12"]


def test_numbers_of_loops_must_rise_and_may_exceed_the_loops():
    assert split_loops("|0|a|2|b|9|c", 3) == ["a", "a", "b"]
    assert split_loops("a | b", 2) == ["a | b"] * 2
    with pytest.raises(ValueError, match=r"must start with \|0\| and increase"):
        split_loops("|0|a|2|b|2|c", 3)


@pytest.mark.parametrize("case", PROMPTS["scores"])
def test_scores(case):
    assert append_scores(case["prompt"], case["aes"], case["flow"], case["camera_motion"]) == case["result"]


@pytest.mark.parametrize("case", PROMPTS["names"])
def test_names_of_samples(case):
    given = (case["sample_idx"], case["prompt"], case["k"], case["num_sample"], case["sample_name"])
    assert f"samples/{sample_name(*given, case['prompt_as_path'])}" == case["result"]


def test_a_prompt_is_turned_into_a_valid_file_name():
    assert sample_name(0, "on/off\n", prompt_as_path=True) == "on_off_"
    long = sample_name(0, "a cat " * 100, prompt_as_path=True)
    other = sample_name(0, "a cat " * 101, prompt_as_path=True)
    assert len(long.encode()) <= 240 and len(other.encode()) <= 240 and long != other


# Mask strategies, against the originals.


def test_strategies_are_parsed():
    for text, wanted in STRATEGIES["parsed"].items():
        assert [list(made) for made in parse_mask_strategy(text)] == wanted, text
    assert parse_mask_strategy(None) == parse_mask_strategy(" ") == []
    assert parse_mask_strategy(" 0 , 1, 2,-3 , 4, 0.5 ") == [(0, 1, 2, -3, 4, 0.5)]


@pytest.mark.parametrize(
    "text", [*STRATEGIES["refused"], "-1", "0,-1", "0,0,0,0,0", "0,0,0,0,1,1.5", "0;", "0,0,0,0,1,nan"]
)
def test_a_malformed_strategy_is_one_line(text):
    with pytest.raises(ValueError, match="mask_strategy") as error:
        parse_mask_strategy(text)
    assert "\n" not in str(error.value) and "a group is loop,reference,start,target,length,edit" in str(error.value)


@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_strategies_are_applied_as_the_originals_apply_them(version):
    cases = [case for case in STRATEGIES["applied"] if case["version"] == version]
    assert len(cases) > 100
    for case in cases:
        counts = enumerate(case["reference_frames"])
        references = [(100 * k + np.arange(count, dtype=np.float32)).reshape(1, -1, 1, 1) for k, count in counts]
        noise = np.full((1, case["T"], 1, 1), -1, np.float32)
        settings = (case["loop"], case["align"], version == "1.1")

        def apply(case=case, noise=noise, references=references, settings=settings):
            return apply_mask_strategy(noise, references, parse_mask_strategy(case["strategy"]), *settings)

        if "error" in case:
            with pytest.raises(ValueError, match="uses latent frame"):
                apply()
            continue
        z, mask = apply()
        assert z.ravel().tolist() == case["frames"], case
        np.testing.assert_array_equal(mask, np.array(case["mask"], np.float32), str(case))
        assert (noise == -1).all()


def test_starts_and_targets_move_to_multiples():
    for case in STRATEGIES["nearest_point"]:
        assert nearest_point(case["value"], case["align"], case["max"]) == case["result"], case


def test_loops_continue_the_clip_before():
    for case in STRATEGIES["loops"]:
        groups = parse_mask_strategy(case["first"])
        given = len({made.reference for made in groups})
        length, edit = case["condition_frame_length"], case["condition_frame_edit"]
        groups += [continuation(loop, given + loop - 1, length, edit) for loop in (1, 2, 3)]
        assert groups == parse_mask_strategy(case["after_three_more_loops"])


def test_a_group_far_longer_than_the_clip_costs_nothing():
    noise, image = np.full((1, 4, 1, 1), -1.0), np.zeros((1, 1, 1, 1))
    for strategy in ("0,0,0,1,1000000000000", "0,0,-1000000000000,1,1000000000001"):
        z, mask = apply_mask_strategy(noise, [image], parse_mask_strategy(strategy), repeat_images=True)
        assert z.ravel().tolist() == [-1, 0, 0, 0] and mask.tolist() == [1, 0, 0, 0]


def test_a_video_that_is_too_short_gives_the_frames_it_has():
    noise, reference = np.full((1, 8, 1, 1), -1.0), np.arange(3.0).reshape(1, 3, 1, 1)
    z, mask = apply_mask_strategy(noise, [reference], parse_mask_strategy("0,0,-8,0,8"), repeat_images=True)
    assert z.ravel().tolist() == [0, 1, 2, -1, -1, -1, -1, -1] and mask.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "strategy, wanted", [("0,2", "reference 2, of which there are 1"), ("0,0,0,8", "the clip has 8")]
)
def test_a_strategy_that_does_not_fit_says_why(strategy, wanted):
    with pytest.raises(ValueError, match=wanted):
        apply_mask_strategy(np.zeros((1, 8, 1, 1)), [np.zeros((1, 1, 1, 1))], parse_mask_strategy(strategy))


# Sizes.


def test_sizes_have_the_names_of_open_sora():
    assert image_size("240p", "9:16") == (240, 426) and image_size("240p", "16:9") == (426, 240)
    assert image_size("720p", "1:1") == (960, 960)
    assert image_size("256", "9:16") == (192, 336)  # the nearest ratio of a table without this one
    assert len({image_size("144p", ratio) for ratio in RATIOS}) == len(RATIOS) == 17
    assert [frame_count(length) for length in (16, "16", "1x", "4s", "32s")] == [16, 16, 51, 102, 816]
    with pytest.raises(ValueError, match="resolution is '240'; did you mean '240p'"):
        image_size("240", "9:16")
    with pytest.raises(ValueError, match="aspect_ratio is '9:15'; did you mean '9:21'"):
        image_size("240p", "9:15")


# The command line.


def test_arguments_have_the_names_of_the_guide():
    with_dashes = [
        *SIZE,
        "--ckpt-path",
        "m.pth",
        "--cfg-scale",
        "7.0",
        "--num-sampling-steps",
        "5",
        "--num-frames",
        "4s",
    ]
    with_dashes += [
        "--prompt",
        'a cat{"mask_strategy": "0"}',
        "--reference-path",
        "a.png;b.mp4",
        "--mask-strategy",
        "0",
    ]
    with_dashes += ["--condition-frame-length", "4", "--prompt-as-path", "--flash-attn", "true"]
    config = parse(*with_dashes)
    assert config == parse(*(argument.replace("-", "_").replace("__", "--") for argument in with_dashes))
    assert (config.model.from_pretrained, config.scheduler.cfg_scale) == ("m.pth", 7.0)
    assert config.prompt == ['a cat{"mask_strategy": "0"}'] and config.reference_path == ["a.png;b.mp4"]
    assert config.frames == 102 and config.size == (240, 426) and config.prompt_as_path
    assert parse(*SIZE, "--mask-strategy", "0", "null", "").mask_strategy == ["0", None, ""]
    assert parse(*SIZE, "--prompt", "[a] cat", "207").prompt == ["[a] cat", "207"]
    assert parse(*SIZE, "--prompt", "null").prompt is None


def test_written_videos_play_at_fps_over_frame_interval():
    assert parse(*SIZE, "--fps", "24", "--frame_interval", "3").rate == 8
    assert parse(*SIZE, "--fps", "24", "--save-fps", "12").rate == 12


GIVEN = {"reference_path": ["a.png"], "mask_strategy": ["0"]}
OF_CLASSES = {"model": DenoiserSection("DiT-XL/2"), "text_encoder": TextEncoderSection("classes")}
WRONG = {
    "reference_path is 'a.png' without a mask_strategy": {"reference_path": ["a.png"]},
    "uses reference 1, but there is 1 reference,": {"reference_path": ["a.png"], "mask_strategy": ["0;0,1"]},
    "uses reference 0, but there are 0 references,": {"mask_strategy": ["0"]},
    "reference_path has 2 entries for 1 prompts": {"reference_path": ["a.png", None]},
    "mask_strategy has 0 entries for 1 prompts": {"mask_strategy": []},
    "which choose the steps both": {"scheduler": SchedulerSection("iddpm", 5, "10")},
    "sp_size is 2; it must be 1": {"sp_size": 2},
    "condition_frame_length is None; it must be at least 1": {"loop": 3},
    "dpm-solver generates all frames of a clip": {**GIVEN, "scheduler": SchedulerSection("dpm-solver")},
    "loop is 2, which needs frame masks, but model.type DiT-XL/2 has no frame masks": {
        "loop": 2,
        "condition_frame_length": 4,
        **OF_CLASSES,
    },
    "iddpm-speed, which only trains": {"scheduler": SchedulerSection("iddpm-speed")},
    "there is no schedule 'ddim'": {"scheduler": SchedulerSection("ddim")},
    "start_index is 5; there are 1 prompts": {"start_index": 5},
    "end_index is 0; it must be above start_index, 0": {"end_index": 0},
    "prompt 0: it is 'a cat'; with text_encoder.type classes": OF_CLASSES,
    "text_encoder.type is t5; model.type DiT-XL/2 takes clip or classes": {"model": DenoiserSection("DiT-XL/2")},
    "text_encoder.type is clip; model.type STDiT2-XL/2 takes t5": {"text_encoder": TextEncoderSection("clip")},
    "there is no network 'STDiT4-XL/2'": {"model": DenoiserSection("STDiT4-XL/2")},
    "llm_refine is True; it must be false": {"llm_refine": True},
    "image_size is [240]; it must be height and width": {"image_size": [240]},
    "image_size must be given, or resolution and aspect_ratio both": {"image_size": None, "resolution": "240p"},
    "num_frames is '3s'; did you mean '32s'?": {"num_frames": "3s"},
    "seed is -1; it must be at least 0": {"seed": -1},
    "model.from_pretrained must be given": {},
    "model.from_pretrained: PRETRAINED_MODEL: no such file or folder": {
        "model": DenoiserSection(from_pretrained="PRETRAINED_MODEL")
    },
    "vae.from_pretrained must be given": {"model": DenoiserSection(from_pretrained=str(DATA))},
}


@pytest.mark.parametrize("message", WRONG)
def test_conflicting_settings_are_one_line_before_anything_is_loaded(message):
    with pytest.raises(ValueError) as error:
        config = GenerateConfig(**{"image_size": [240, 426], "prompt": ["a cat"], **WRONG[message]})
        read_requests(config)
        check_paths(config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["micro_batch_size", "micro_frame_size", "scaling_factor", "max_memory"])
def test_settings_of_the_autoencoder_are_above_zero(field):
    with pytest.raises(ValueError, match=rf"{field} is 0(\.0)?; it must be (at least 1|above 0), or null"):
        parse(*SIZE, f"--vae.{field}", "0")


@pytest.mark.parametrize(
    "prompts", [["on/off", "on_off"], ["a cat", 'a cat{"reference_path": "a", "mask_strategy": "0"}']]
)
def test_no_two_samples_have_one_name(prompts):
    config = parse(*SIZE, "--prompt", *prompts, "--prompt-as-path")
    with pytest.raises(ValueError, match="prompts 0 and 1 would both be named"):
        check_names(config, read_requests(config))
    same = parse(*SIZE, "--prompt", prompts[0], prompts[0], "--prompt-as-path")  # which has its sample once
    check_names(same, read_requests(same))
    check_names(parse(*SIZE), read_requests(config))


def test_a_strategy_for_a_loop_that_never_runs_is_reported(caplog):
    arguments = [*SIZE, "--prompt", "a cat", "--reference-path", "a.png", "--condition-frame-length", "4"]
    read_requests(parse(*arguments, "--mask-strategy", "0;1,0,0,-1", "--loop", "2"))
    assert not caplog.records
    read_requests(parse(*arguments, "--mask-strategy", "1"))
    assert "prompt 0: mask_strategy '1' has a group for loop 1, but the only loop is 0" in caplog.text


def test_prompts_come_from_a_file_in_ranges(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('  first \n\n{"reference_path": "a.png", "mask_strategy": "0"}\nlast\n', encoding="utf-8")
    requests = read_requests(parse(*SIZE, "--prompt-path", str(path), "--aes", "6.5"))
    assert [request.prompt for request in requests] == ["first", "", "", "last"]  # blank lines are prompts, too
    assert requests[2].references == ["a.png"] and requests[0].texts == ["first aesthetic score: 6.5."]
    some = read_requests(parse(*SIZE, "--prompt-path", str(path), "--start-index", "1", "--end-index", "3"))
    assert [request.index for request in some] == [1, 2]
    with pytest.raises(ValueError, match="none.txt: no such file"):
        read_requests(parse(*SIZE, "--prompt-path", str(tmp_path / "none.txt")))
    with pytest.raises(ValueError, match="prompt or prompt_path must be given"):
        read_requests(parse(*SIZE))


def test_the_suffix_of_a_prompt_overrides_the_lists():
    lists = ["--reference-path", "b.png", "--mask-strategy", "0,0,0,-1"]
    suffix = '{"reference_path": "a.png;c.png", "mask_strategy": "0;0,1"}'
    (request,) = read_requests(parse(*SIZE, "--prompt", f"a cat{suffix}", *lists))
    assert request.references == ["a.png", "c.png"] and request.mask_strategy == "0;0,1"
    assert request.prompt == "a cat"
