"""Settings: what is refused, in which words, and how the three sources are laid over each other."""

import dataclasses
import json

import pytest

from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.methods.videonsa.settings import VideoNSASettings
from vllm_adaspark.settings import Settings, SettingsError, setting

# Keys that a request may not set; these decide what is computed, so a checkpoint may.
TRAINED_KEYS = {"dense_below": 4, "cube_queries": 4, "tile_cubes": 2, "score": "bounds"}
SERVER_KEYS = TRAINED_KEYS | {
    "encoder_patches": 1024,
    "trace_mb": 8,
    "report_file": "report.jsonl",
}
OPERATORS_KEYS = {
    "encoder_patches": 1024,
    "trace_mb": 8,
    "report_file": "report.jsonl",
    "trace": True,
}


@pytest.mark.parametrize(
    ("written", "meant"),
    [("p_atn", "p_attn"), ("pffn", "p_ffn"), ("selecton", "selection"), ("cubes", "cube")],
)
def test_unknown_key_is_named_with_the_nearest_known_one(written, meant):
    with pytest.raises(SettingsError) as caught:
        AdaSparkConfig().override({written: 0.5}, source="--additional-config adaspark")
    message = str(caught.value)
    assert "--additional-config adaspark" in message
    assert repr(written) in message
    assert f"did you mean {meant!r}" in message
    assert "dense_layers" in message  # all allowed keys are listed


def test_unknown_key_without_a_near_one_suggests_nothing():
    with pytest.raises(SettingsError) as caught:
        AdaSparkConfig().override({"temperature": 0.5})
    assert "'temperature'" in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_key_that_is_no_string_is_an_unknown_key():
    with pytest.raises(SettingsError, match="unknown key 7"):
        AdaSparkConfig().override({7: 0.5})


@pytest.mark.parametrize("settings", [[], "p_attn=0.5", 0.5, True])
def test_settings_must_be_an_object(settings):
    with pytest.raises(SettingsError, match="must be an object of settings"):
        AdaSparkConfig().override(settings)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("p_attn", 0, "above 0 and at most 1"),
        ("p_attn", -0.1, "above 0 and at most 1"),
        ("p_attn", 1.5, "above 0 and at most 1"),
        ("p_attn", "x", "above 0 and at most 1"),
        ("p_attn", "0.5", "above 0 and at most 1"),
        ("p_attn", None, "above 0 and at most 1"),
        ("p_attn", True, "above 0 and at most 1"),
        ("p_attn", float("nan"), "above 0 and at most 1"),
        ("p_attn", float("inf"), "above 0 and at most 1"),
        ("p_ffn", 0.0, "above 0 and at most 1"),
        ("prune", 1, "from 0 to below 1"),
        ("prune", 1.0, "from 0 to below 1"),
        ("prune", -0.1, "from 0 to below 1"),
        ("prune", "0.5", "from 0 to below 1"),
        ("prune", None, "from 0 to below 1"),
        ("prune", False, "from 0 to below 1"),
        ("prune", float("nan"), "from 0 to below 1"),
        ("flops", 0, "above 0 and at most 1, or null"),
        ("flops", 1.2, "above 0 and at most 1, or null"),
        ("trace", "yes", "true or false"),
        ("trace_mb", -1, "an integer from 0"),
        ("keep", 2, "above 0 and at most 1"),
        ("selection", "topp", "'top_p', 'top_k', 'uniform'"),
        ("selection", 1, "'top_p', 'top_k', 'uniform'"),
        ("compensation", "none", "'centroid', 'mean', 'bypass'"),
        ("text_queries", ["sparse"], "'sparse', 'dense'"),
        ("order", "hilbert", "'cube', 'raster'"),
        ("min_cubes", 0, "an integer from 1 to 16"),
        ("cube_queries", 0, "an integer from 1 to 128"),
        ("cube_queries", 12, "a power of two, e.g. 8"),
        ("tile_cubes", 0, "an integer from 1 to 2"),
        ("tile_cubes", 3, "an integer from 1 to 2"),
        ("min_cubes", 17, "an integer from 1 to 16"),
        ("score", "max", "'mean', 'bounds'"),
        ("min_cubes", 2.0, "an integer from 1 to 16"),
        ("min_cubes", True, "an integer from 1 to 16"),
        ("dense_layers", -1, "an integer from 0 to 15"),
        ("dense_layers", 16, "an integer from 0 to 15"),
        ("dense_below", -1, "an integer from 0"),
        ("encoder_patches", 0, "an integer from 1"),
        ("cube", 64, "three integers"),
        ("cube", "4x4x4", "three integers"),
        ("cube", [4, 4], "three integers"),
        ("cube", [4, 4, 0], "three integers"),
        ("cube", [4, 4, 65], "three integers"),
        ("cube", [4, 4, 4.0], "three integers"),
        ("cube", [4, 4, True], "three integers"),
        ("enabled", 1, "true or false"),
        ("enabled", "yes", "true or false"),
        ("report_file", "", "a path or null"),
        ("report_file", 3, "a path or null"),
    ],
)
def test_bad_value_names_key_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(SettingsError) as caught:
        AdaSparkConfig().override({key: value}, source="checkpoint")
    message = str(caught.value)
    assert message.startswith("checkpoint: ")
    assert f"{key}={value!r}" in message
    assert allowed in message
    with pytest.raises(SettingsError):
        AdaSparkConfig(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("p_attn", 1),
        ("p_attn", 1.0),
        ("p_ffn", 0.001),
        ("keep", 0.5),
        ("min_cubes", 16),
        ("dense_layers", 15),
        ("cube", [1, 1, 64]),
        ("cube", (64, 1, 1)),
        ("enabled", False),
        ("report_file", None),
    ],
)
def test_edge_values_are_accepted(key, value):
    got = getattr(AdaSparkConfig().override({key: value}), key)
    assert got == (tuple(value) if key == "cube" else value)


@dataclasses.dataclass(frozen=True)
class Numbers(Settings):
    """A method's settings that leave out some of what ``setting`` takes."""

    number: int = setting(4, "any number")
    count: int = setting(2, "a number of something", low=0)
    weight: float = setting(0.5, "any weight")
    angle: float = setting(10.0, "an angle", low=-90, high=90.5)


def test_a_setting_without_bounds_is_what_its_default_is():
    said = Numbers().override({"number": -7, "count": 10**6, "weight": 3, "angle": 90.5})
    assert (said.number, said.count, said.weight, said.angle) == (-7, 10**6, 3.0, 90.5)
    assert isinstance(said.weight, float)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("number", 1.5, "an integer"),
        ("number", True, "an integer"),
        ("number", None, "an integer"),
        ("count", -1, "an integer from 0"),
        ("weight", "1", "a number"),
        ("weight", float("nan"), "a number"),
        ("weight", float("inf"), "a number"),
        ("weight", 10**400, "a number"),
        ("angle", 91, "a number from -90 to 90.5"),
    ],
)
def test_what_is_no_such_number_is_refused(key, value, allowed):
    with pytest.raises(SettingsError, match=f"{key}=.*: expected {allowed}$"):
        Numbers().override({key: value})


@pytest.mark.parametrize("key", ["p_attn", "p_ffn", "keep"])
def test_shares_are_rounded_to_thousandths_but_never_to_nothing_or_to_dense(key):
    def rounded(value):
        return getattr(AdaSparkConfig(**{key: value}), key)

    assert rounded(0.12345) == 0.123
    assert rounded(1e-9) == 0.001
    assert rounded(0.9999) == 0.999
    assert rounded(1) == 1.0
    assert isinstance(rounded(1), float)


def test_rising_priority_leaves_other_keys_alone():
    checkpoint = {"p_attn": 0.8, "p_ffn": 0.3, "dense_layers": 2}
    server = AdaSparkConfig.settled(checkpoint, {"p_attn": 0.7, "min_cubes": 3})
    request = server.override({"p_attn": 0.5}, request=True)
    assert (request.p_attn, request.p_ffn, request.min_cubes, request.dense_layers) == (
        0.5,
        0.3,
        3,
        2,
    )
    assert server.p_attn == 0.7  # the lower layers are unchanged
    assert request.override(None) is request
    assert request.override({}) == request


@pytest.mark.parametrize(("key", "value"), SERVER_KEYS.items())
def test_a_request_may_not_set_a_server_key(key, value):
    assert getattr(AdaSparkConfig().override({key: value}), key) == value
    with pytest.raises(SettingsError, match="cannot be set per request") as caught:
        AdaSparkConfig().override({key: value}, request=True)
    allowed = str(caught.value).split("allowed: ")[1].split(", ")
    assert "p_attn" in allowed
    assert not set(allowed) & set(SERVER_KEYS)


@pytest.mark.parametrize(("key", "value"), OPERATORS_KEYS.items())
def test_a_checkpoint_may_not_set_what_is_the_operators(key, value):
    with pytest.raises(SettingsError, match="cannot be set by a checkpoint") as caught:
        AdaSparkConfig.settled({"p_attn": 0.5, key: value}, {"p_attn": 0.4})
    message = str(caught.value)
    assert message.startswith(f"config.json adaspark_config: {key!r}")
    assert not set(message.split("allowed: ")[1].split(", ")) & set(OPERATORS_KEYS)
    with pytest.raises(SettingsError, match=repr(key)):  # also where the operator names it
        AdaSparkConfig.settled({key: value}, {key: value})
    assert getattr(AdaSparkConfig.settled(None, {key: value}), key) == value


def test_a_checkpoint_may_set_what_training_fixes():
    assert AdaSparkConfig.settled(TRAINED_KEYS, None) == AdaSparkConfig(**TRAINED_KEYS)
    assert AdaSparkConfig.settled(TRAINED_KEYS, {"dense_below": 8}).dense_below == 8


@pytest.mark.parametrize("off", ["off", {"off": True}, {"off": True, "p_attn": 0.5}])
@pytest.mark.parametrize(
    "checkpoint",
    [
        {"order": "cube", "enabled": True},
        {"cube": [2, 4, 4], "flops": 0.3},
        "paper",
        {"report_file": "x", "no such key": 1},
    ],
)
def test_an_operators_off_is_stock_whatever_the_checkpoint_says(off, checkpoint):
    assert AdaSparkConfig.settled(checkpoint, off) == AdaSparkConfig().override(off)
    assert AdaSparkConfig.settled(checkpoint, off).cube_volume == AdaSparkConfig().cube_volume
    assert not AdaSparkConfig.settled(None, off).enabled


def test_words_of_two_sources():
    bypass = {"compensation": "bypass", "min_cubes": 5}
    assert AdaSparkConfig.settled(bypass, "paper") == AdaSparkConfig().override("paper")
    paper = AdaSparkConfig.settled("paper", bypass)
    assert (paper.importance, paper.compensation, paper.min_cubes) == ("norm", "bypass", 5)
    assert AdaSparkConfig.settled("off", None) == AdaSparkConfig(enabled=False, order="raster")
    assert AdaSparkConfig.settled("off", {"enabled": True}).enabled
    assert AdaSparkConfig.settled({"p_attn": 0.3}, {"off": False}).p_attn == 0.3


def test_a_wrong_value_is_told_with_its_source():
    with pytest.raises(SettingsError, match=r"^config\.json adaspark_config: p_attn=7"):
        AdaSparkConfig.settled({"p_attn": 7}, {"p_attn": 0.5})
    with pytest.raises(SettingsError, match=r"^--additional-config adaspark: p_attn=7"):
        AdaSparkConfig.settled({"p_attn": 0.5}, {"p_attn": 7})


def test_a_request_may_change_a_cubes_shape_but_not_its_volume():
    server = AdaSparkConfig()
    assert server.override({"cube": [1, 8, 8]}, request=True).cube == (1, 8, 8)
    with pytest.raises(SettingsError) as caught:
        server.override({"cube": [2, 4, 4]}, request=True)
    message = str(caught.value)
    assert "cube=[2, 4, 4] holds 32 tokens" in message
    assert "hold 64" in message
    assert server.override({"cube": [2, 4, 4]}).cube_volume == 32  # the server may


@pytest.mark.parametrize("off", ["off", {"off": True}, {"off": True, "p_attn": 0.5}])
def test_off_is_dense_in_the_stock_models_order(off):
    request = AdaSparkConfig().override(off, request=True)
    assert not request.enabled
    assert request.order == "raster"
    assert not (request.sparse_attention or request.sparse_ffn)


@pytest.mark.parametrize("paper", ["paper", {"paper": True}])
def test_paper_is_the_papers_own_rules(paper):
    ours = AdaSparkConfig(p_attn=0.4, selection="top_k", min_cubes=3)
    config = ours.override(paper, request=True)
    assert config.p_attn == 0.4
    assert (config.selection, config.min_cubes) == ("top_p", 1)
    assert (config.importance, config.compensation) == ("norm", "mean")


def test_paper_is_refused_of_a_request_where_the_server_scores_otherwise():
    """What is kept of KV blocks is the server's, so a request cannot have the paper's score."""
    server = AdaSparkConfig(score="bounds")
    with pytest.raises(SettingsError, match="'paper' means score='mean', but on this server"):
        server.override("paper", request=True)
    with pytest.raises(SettingsError, match="'paper' means"):
        server.override({"p_attn": 0.4, "paper": True}, request=True)
    assert server.override("off", request=True).score == "bounds"
    assert server.override({"paper": False}, request=True) == server
    assert server.override("paper").score == "mean"
    beside = server.override({"paper": True, "score": "bounds"})
    assert (beside.score, beside.min_cubes) == ("bounds", 1)


def test_what_is_named_beside_paper_counts():
    config = AdaSparkConfig().override({"compensation": "bypass", "paper": True})
    assert (config.importance, config.compensation) == ("norm", "bypass")
    assert AdaSparkConfig().override({"paper": False}) == AdaSparkConfig()
    with pytest.raises(SettingsError, match="paper='yes': expected true or false"):
        AdaSparkConfig().override({"paper": "yes"})


def test_off_false_changes_nothing_and_off_must_be_a_bool():
    assert AdaSparkConfig().override({"off": False}) == AdaSparkConfig()
    with pytest.raises(SettingsError, match="off=1: expected true or false"):
        AdaSparkConfig().override({"off": 1})


def test_a_budget_and_the_p_it_replaces():
    server = AdaSparkConfig().override({"flops": 0.5})
    assert (server.flops, server.sparse_attention, server.sparse_ffn) == (0.5, True, True)
    assert not AdaSparkConfig(flops=1).sparse_attention
    for key in ("p_attn", "p_ffn", "keep"):
        with pytest.raises(SettingsError, match=f"flops=0.4 and {key}=0.3"):
            AdaSparkConfig().override({"flops": 0.4, key: 0.3})
        assert server.override({key: 0.3}).flops is None  # the later source decides
    assert server.override({"flops": None}) == AdaSparkConfig()
    assert server.override({"min_cubes": 2}).flops == 0.5
    assert AdaSparkConfig(p_attn=0.3).override({"flops": 0.4}).flops == 0.4
    assert AdaSparkConfig().override(server.to_dict()) == server


@pytest.mark.parametrize(
    ("lower", "upper", "counts"),
    [
        ({"flops": 0.4}, {"p_attn": 0.3}, {"p_attn": 0.3, "flops": None}),
        ({"flops": 0.4}, {"selection": "top_k"}, {"selection": "top_k", "flops": None}),
        ({"flops": 0.4}, {"selection": "top_p"}, {"flops": 0.4}),
        ({"p_attn": 0.3, "p_ffn": 0.2}, {"flops": 0.4}, {"flops": 0.4}),
        ({"selection": "uniform", "keep": 0.1}, {"flops": 0.4}, {"selection": "top_p"}),
        ({"selection": "uniform"}, {"flops": None}, {"selection": "uniform", "flops": None}),
        ({"flops": 0.4}, "paper", {"flops": 0.4, "min_cubes": 1}),
    ],
)
def test_of_two_sources_the_later_decides_on_the_budget(lower, upper, counts):
    """Between checkpoint and operator as between server and request."""
    for config in (
        AdaSparkConfig.settled(lower, upper),
        AdaSparkConfig.settled(None, lower).override(upper, request=True),
    ):
        assert {key: getattr(config, key) for key in counts} == counts


def test_a_budget_chooses_p_so_it_needs_top_p():
    with pytest.raises(SettingsError, match="selection='uniform' cannot be kept"):
        AdaSparkConfig().override({"flops": 0.4, "selection": "uniform"})


def test_what_runs_sparse():
    assert AdaSparkConfig().sparse_attention
    assert AdaSparkConfig().sparse_ffn
    assert not AdaSparkConfig(enabled=False).sparse_attention
    assert not AdaSparkConfig(enabled=False).sparse_ffn
    assert not AdaSparkConfig(p_attn=1).sparse_attention
    assert not AdaSparkConfig(p_ffn=1).sparse_ffn
    # The share that counts is the one the rule reads.
    assert AdaSparkConfig(selection="top_k", p_attn=1, keep=0.5).sparse_attention
    assert not AdaSparkConfig(selection="uniform", p_attn=0.5, keep=1).sparse_attention


def test_frozen_and_round_trips_through_json():
    config = AdaSparkConfig(p_attn=0.5, cube=[8, 4, 4], selection="uniform", report_file="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.p_attn = 1.0
    assert AdaSparkConfig().override(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(dataclasses.replace(config))


def test_what_a_text_config_says_wrong_is_not_looked_for_elsewhere():
    said = VideoNSASettings.of_checkpoint({"text_config": {"block_counts": 0}})
    with pytest.raises(SettingsError, match=r"^config\.json text_config or .*block_counts=0"):
        VideoNSASettings.settled(said, None)
