"""The architecture reads and writes transformers' config, and refuses what it would not compute."""

import json

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from picotron_core.errors import ConfigError
from picotron_core.model.architecture import Architecture, RopeScaling
from picotron_core.model.rope import RopeTables, rope_tables

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_theta": 500000.0, **LLAMA3},
}
JSON = {"model_type": "llama", **SIZES}


def architecture(**changes):
    return Architecture(**({**SIZES, "head_dim": 8} | changes))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True, "head_dim": 12, "rms_norm_eps": 1e-5},
        {"rope_parameters": ROPES["llama3"], "eos_token_id": [5, 6], "bos_token_id": None},
        {"rope_parameters": ROPES["linear"], "initializer_range": 0.01},
        {"num_key_value_heads": None, "max_position_embeddings": 123},
    ],
)
def test_a_config_comes_back_the_same_through_transformers(config, tmp_path):
    theirs = LlamaConfig(**(SIZES | config))
    ours = Architecture.from_transformers(theirs)
    (tmp_path / "config.json").write_text(json.dumps(ours.to_transformers()))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LlamaConfig
    for key in (*SIZES, "head_dim", "rope_parameters", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(loaded, key) == getattr(theirs, key), key
    for key in ("eos_token_id", "bos_token_id", "initializer_range", "max_position_embeddings"):
        assert getattr(loaded, key) == getattr(theirs, key), key
    assert Architecture.from_transformers(loaded) == ours


def test_both_generations_of_config_json_mean_the_same():
    new = Architecture.from_transformers(JSON | {"rope_parameters": ROPES["llama3"]})
    old = Architecture.from_transformers(JSON | {"rope_theta": 5e5, "rope_scaling": LLAMA3})
    assert new == old
    assert new.rope_theta == 500000.0
    assert new.rope_scaling == RopeScaling(**LLAMA3)
    legacy = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert Architecture.from_transformers(JSON | legacy).rope_scaling.factor == 2.0


def test_a_bare_config_json_means_what_it_means_to_transformers():
    bare = {key: value for key, value in JSON.items() if key != "num_key_value_heads"}
    theirs = LlamaConfig(**{key: bare[key] for key in bare if key != "model_type"})
    assert Architecture.from_transformers(bare) == Architecture.from_transformers(theirs)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model_type", {"model_type": "qwen2"}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("attention_bias", {"attention_bias": True}),
        ("mlp_bias", {"mlp_bias": True}),
        ("attention_dropout", {"attention_dropout": 0.1}),
        ("sliding_window", {"sliding_window": 4096}),
        ("quantization_config", {"quantization_config": {"bits": 4}}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("rope_type", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
        ("rope_type", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("rope_parameters.factor", {"rope_parameters": {"rope_type": "linear"}}),
        ("low_freq_factor", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}),
        ("high_freq_factor", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}),
        ("rope_parameters.beta_fast", {"rope_parameters": {"beta_fast": 32}}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("hidden_size", {"hidden_size": 60}),
        ("hidden_size", {"hidden_size": None}),
        ("hidden_size", {"hidden_size": "64"}),
        ("head_dim", {"head_dim": 7}),
        ("num_attention_heads", {"num_attention_heads": 0}),
        ("factor", {"rope_scaling": LLAMA3 | {"factor": "8"}}),
        ("vocab_size", {"vocab_size": 0}),
        ("rms_norm_eps", {"rms_norm_eps": 0}),
        ("rope_theta", {"rope_theta": -1.0}),
    ],
)
def test_what_would_be_computed_differently_is_refused_by_name(key, changes):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as error:
        Architecture.from_transformers(JSON | changes)
    assert "\n" not in str(error.value)


def test_a_config_that_names_no_model_type_is_refused():
    with pytest.raises(ConfigError, match="model_type"):
        Architecture.from_transformers(SIZES)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_transformers_has_them(tied):
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=12, tie_word_embeddings=tied))
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert Architecture.from_transformers(theirs.config).num_parameters == count


def test_flops_per_token_are_what_torch_counts():
    """torch's counter sees all T x T of attention, of which a causal mask needs half."""
    from torch.utils.flop_counter import FlopCounterMode

    T = 32
    config = LlamaConfig(**SIZES, attn_implementation="eager")
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 97, (1, T))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    ours = Architecture.from_transformers(config)
    attention = 6 * 2 * 8 * 8 * T  # L H D T, the causal half
    rope_angles = 2 * T * 4  # transformers' own small product of positions and frequencies
    counted = counter.get_total_flops()
    assert abs(counted - T * (ours.flops_per_token(T) + attention)) <= rope_angles


@pytest.mark.parametrize("rope", ROPES)
def test_the_rotary_tables_equal_transformers(rope):
    config = LlamaConfig(**SIZES, rope_parameters=ROPES[rope], max_position_embeddings=512)
    cos, sin = rope_tables(Architecture.from_transformers(config), 512)
    assert cos.shape == sin.shape == (512, 4)
    assert cos.dtype == sin.dtype == torch.float32
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(512)[None])
    for ours, (reference,) in zip((cos, sin), theirs, strict=True):
        torch.testing.assert_close(ours, reference[:, :4], rtol=0, atol=1e-6)
        torch.testing.assert_close(ours, reference[:, 4:], rtol=0, atol=1e-6)


def test_rotary_tables_grow_without_changing_and_end_at_the_longest_context():
    tables = RopeTables(architecture(max_position_embeddings=100))
    cpu = torch.device("cpu")
    short = tables(3, 5, cpu)
    long = tables(0, 100, cpu)
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b[3:8])
    with pytest.raises(ValueError, match=r"101 tokens .* max_position_embeddings = 100"):
        tables(100, 1, cpu)
