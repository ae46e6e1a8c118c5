"""Options: what is accepted, what each error says, and the way to JSON and back."""

import dataclasses
import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsa_compile.config import OPTIONS, Coverage, Floor, KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError

INVALID = {
    "budget": [None, 0.5, "coverage", {"coverage": 0.1, "keep_ratio": 0.5}, {"tau": 0.1}, {}],
    "window": [0, -1, 1.0, "128", True, None],
    "score": ["median", "MAX", None, 3, True],
    "pool": [0, -1, 2, 8, 7.0, "7", True, None, 2**40 + 1],
    "min_tokens": [-1, 1.5, "1024", True, None],
    "layers": [
        3, "model.layers.3", [1, "a"], [-1], [1.0], [True], [""], [None], [[1]], {1: 2}, {1: "a"}, {-1: 0.5}, {1: True},
        {1: 0.5, "1": 0.25}, {1: 0.5, "a": 0.5}, range(10**12), range(10**12, 0, -1),
    ],
    "floor": [3, True, (256, 16), {"width": 3}, {"window": 8, "sinks": 1, "more": 0}],
    "granularity": ["heads", "", None, 1, ["head"]],
    "capacity": [0, -1, 2.0, "8", True],
    "min_length": [0, -1, 2.0, "8", True],
    "kernel": ["", None, 3],
    "dense_kernel": ["", 3, True],
    "skip_passes": [None, "Validate", [1]],
    "regional": [0, 1, "yes"],
    "strict": [None, 1, "yes"],
    "compiler": ["", None, 3],
}  # fmt: skip


def test_the_settings_of_the_publication():
    config = TSAConfig.published()
    assert (config.budget, config.window, config.pool, config.min_tokens) == (Coverage(0.005), 128, 7, 1024)
    assert (config.score, config.floor, config.layers) == ("mean", None, None)
    assert TSAConfig.published(window=64) == config.replace(window=64)
    with pytest.raises(ConfigError, match="did you mean 'window'"):
        TSAConfig.published(windw=64)


def test_defaults():
    config = TSAConfig()
    assert (config.budget, config.floor) == (KeepRatio(0.15), Floor(window=256, sinks=16))
    assert (config.window, config.score, config.pool, config.min_tokens) == (128, "max", 7, 1024)
    assert (config.layers, config.granularity, config.kernel, config.compiler) == (None, "head", "auto", "inductor")
    assert (config.capacity, config.min_length, config.dense_kernel) == (None, None, None)
    assert (config.regional, config.strict) == (None, False)


def test_every_option_has_invalid_values_here():
    assert set(INVALID) == set(OPTIONS)


@pytest.mark.parametrize(("option", "value"), [(option, value) for option in INVALID for value in INVALID[option]])
def test_an_invalid_value_is_named_with_its_option_and_what_is_allowed(option, value):
    with pytest.raises(ConfigError) as caught:
        TSAConfig(**{option: value})
    message = str(caught.value)
    if not message.startswith(("Coverage", "KeepRatio")):
        assert message.startswith(f"{option}={value!r} ")
    assert "must be" in message


@pytest.mark.parametrize("tau", [-0.1, 1, 1.0, 2, float("nan"), float("inf"), "0.1", None, True, 10**400])
def test_coverage_outside_zero_to_one(tau):
    with pytest.raises(ConfigError, match=r"Coverage\.tau=.*\[0, 1\)"):
        Coverage(tau)


@pytest.mark.parametrize(("window", "sinks"), [(0, 1), (-1, 1), (8, -1), (8.0, 1), (True, 1), (8, None), (None, 1)])
def test_a_floor_of_no_tokens(window, sinks):
    with pytest.raises(ConfigError, match=r"floor\.(window|sinks)=.* must be an integer >= [01]"):
        Floor(window, sinks)


@pytest.mark.parametrize("ratio", [-0.5, 1.01, float("nan"), "1", None, True])
def test_keep_ratio_outside_zero_to_one(ratio):
    with pytest.raises(ConfigError, match=r"KeepRatio\.ratio=.*\[0, 1\]"):
        KeepRatio(ratio)


def test_limits_are_inside():
    assert Coverage(0).tau == 0.0
    assert KeepRatio(1).ratio == 1.0
    assert TSAConfig(window=1, pool=1, min_tokens=0, capacity=1, min_length=1).pool == 1


@pytest.mark.parametrize(
    ("ratio", "fraction"),
    [(0.675, Fraction(27, 40)), (0.1, Fraction(1, 10)), (1, Fraction(1)), (1e-7, Fraction(1, 10**7))],
)
def test_fraction_is_what_was_written(ratio, fraction):
    assert KeepRatio(ratio).fraction == fraction


@pytest.mark.parametrize(
    ("layers", "stored"),
    [
        ([], ()),
        ([2, 1], (2, 1)),
        (range(3), (0, 1, 2)),
        ((1, 1, 2), (1, 2)),
        (["model.layers.*", "h.1"], ("model.layers.*", "h.1")),
        (None, None),
    ],
)
def test_layers_become_a_tuple(layers, stored):
    assert TSAConfig(layers=layers).layers == stored


def test_layers_may_have_a_budget_each():
    config = TSAConfig(layers={3: 0.5, 1: Coverage(0.01), 2: KeepRatio(1)})
    assert config.layers == {3: KeepRatio(0.5), 1: Coverage(0.01), 2: KeepRatio(1)}
    assert config.budgets == (KeepRatio(0.5), Coverage(0.01), KeepRatio(1))
    assert TSAConfig(layers=[1]).budgets == (TSAConfig().budget,)
    assert list(config.layers) == [3, 1, 2] and hash(config) == hash(TSAConfig.from_json(config.to_json()))
    assert TSAConfig.from_json(config.to_json()) == config and config.replace(layers=config.layers) == config
    assert json.loads(config.to_json())["layers"] == {"3": 0.5, "1": {"coverage": 0.01}, "2": 1.0}
    assert TSAConfig(layers={}).layers == () and TSAConfig(layers={"7": 0.5}).layers == {7: KeepRatio(0.5)}
    assert config != config.replace(layers=[3, 1, 2]) and config != config.replace(layers={1: 0.5})


def test_a_layer_has_the_budget_of_the_first_entry_that_names_it():
    config = TSAConfig(layers={"model.layers.1*": 0.5, "*.attn": 0.25}, window=8)
    names = ("model.layers.1.attn", "model.layers.2.attn")
    assert [config.of_layer(None, (name,)).budget for name in names] == [KeepRatio(0.5), KeepRatio(0.25)]
    assert config.of_layer(None, ["a"]) == config and TSAConfig(layers=[3]).of_layer(3, ["a"]) == TSAConfig(layers=[3])
    numbered = TSAConfig(layers={1: 0.5, 2: 0.125})
    assert numbered.of_layer(2, ["model.layers.1"]) == numbered.replace(budget=KeepRatio(0.125))


def test_a_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TSAConfig().window = 3
    assert len({TSAConfig(layers=[1]), TSAConfig(layers=(1,)), TSAConfig()}) == 2


def test_an_invalid_value_is_a_value_error_too():
    with pytest.raises(ValueError):
        TSAConfig(window=0)


class TestFromOptions:
    def test_none_and_empty_are_the_defaults(self):
        assert TSAConfig.from_options(None) == TSAConfig.from_options({}) == TSAConfig()

    def test_fields(self):
        options = {"budget": Coverage(0.008), "layers": [15, 16]}
        assert TSAConfig.from_options(options) == TSAConfig(budget=Coverage(0.008), layers=(15, 16))

    def test_a_field_overrides_the_config(self):
        config = TSAConfig(window=64, pool=5)
        assert TSAConfig.from_options({"config": config}) is not None
        assert TSAConfig.from_options({"config": config, "pool": 3}) == TSAConfig(window=64, pool=3)

    def test_options_are_left_as_they_were(self):
        options = {"config": TSAConfig(), "pool": 3}
        TSAConfig.from_options(options)
        assert set(options) == {"config", "pool"}

    def test_an_unknown_option_suggests_the_nearest(self):
        with pytest.raises(ConfigError, match=r"'windw' is not an option \(did you mean 'window'\?\).*min_tokens"):
            TSAConfig.from_options({"windw": 3})

    def test_an_unknown_option_far_from_all_lists_them(self):
        with pytest.raises(ConfigError, match=r"'zzz' is not an option: the options are budget, window"):
            TSAConfig.from_options({"zzz": 3})

    @pytest.mark.parametrize("options", [{"config": {"window": 3}}, {3: 4}, [("window", 3)]])
    def test_other_types(self, options):
        with pytest.raises(ConfigError):
            TSAConfig.from_options(options)


def test_replace_validates():
    assert TSAConfig().replace(window=3).window == 3
    with pytest.raises(ConfigError, match="window"):
        TSAConfig().replace(window=0)
    with pytest.raises(ConfigError, match="did you mean 'strict'"):
        TSAConfig().replace(strct=True)


unit = st.floats(0, 1, exclude_max=True)
budgets = st.builds(Coverage, unit) | st.builds(KeepRatio, st.floats(0, 1))
names = st.text(min_size=1, max_size=8)
configs = st.builds(
    TSAConfig,
    budget=budgets,
    window=st.integers(1, 4096),
    pool=st.integers(0, 20).map(lambda n: 2 * n + 1),
    min_tokens=st.integers(0, 4096),
    floor=st.none() | st.builds(Floor, st.integers(1, 999), st.integers(0, 99)),
    layers=st.none() | st.lists(st.integers(0, 99)) | st.lists(names),
    granularity=st.sampled_from(["head", "group"]),
    capacity=st.none() | st.integers(10_000, 2**31 - 1),
    min_length=st.none() | st.integers(1, 2**31 - 1),
    kernel=names,
    skip_passes=st.lists(st.sampled_from(["Validate", "Decompose"]), unique=True),
    strict=st.booleans(),
    compiler=names,
)


class TestJson:
    @given(configs)
    def test_round_trip(self, config):
        assert TSAConfig.from_json(config.to_json()) == config
        assert TSAConfig.from_json(config.to_dict()) == config

    def test_missing_fields_are_defaults(self):
        assert TSAConfig.from_json('{"budget": {"keep_ratio": 0.5}}') == TSAConfig(budget=KeepRatio(0.5))

    def test_files_by_path_and_by_name(self, tmp_path):
        config = TSAConfig(layers=["h.1"])
        path = tmp_path / "config.json"
        path.write_text(config.to_json())
        assert TSAConfig.from_json(path) == TSAConfig.from_json(str(path)) == config

    def test_a_callable_compiler_is_refused_and_says_so(self):
        def compiler(graph_module, inputs):
            return graph_module

        config = TSAConfig(compiler=compiler)
        with pytest.raises(ConfigError, match=r"compiler=.*only a Dynamo backend's name"):
            config.to_json()
        json.dumps(config.to_dict())  # a report still names it
        assert config.to_dict()["compiler"].endswith("compiler")

    @pytest.mark.parametrize("source", ["{", "[1]", "no/such/file.json", "", 3, '{"windw": 3}', '{"window": 0}', "{} {}"])
    def test_what_is_no_config(self, source):
        with pytest.raises(ConfigError):
            TSAConfig.from_json(source)

    @pytest.mark.parametrize("text", ['{"window": 64, "window": 128}', '{"floor": {"window": 64, "window": 256}}'])
    def test_a_key_that_is_there_twice(self, text):
        with pytest.raises(ConfigError, match="the config is not valid JSON: 'window' is there twice"):
            TSAConfig.from_json(text)

    def test_a_file_that_holds_no_object(self, tmp_path):
        path = tmp_path / "config.json"
        path.write_text("[1]")
        with pytest.raises(ConfigError, match=r"config\.json' must be a JSON object"):
            TSAConfig.from_json(path)


def test_a_calibration_is_told_from_a_configuration():
    with pytest.raises(ConfigError, match=r"load_calibration\(path\)\.config\(\).*--sparse-layers"):
        TSAConfig.from_json({"format": "tsa_compile.calibration/1", "fingerprint": {}})
