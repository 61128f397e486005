"""A Hugging Face config as an `Architecture`, and the errors for wrong ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.families.family import Architecture
from megatron_fipo.families.registry import read_architecture

ARCHITECTURE = Architecture(
    num_layers=4,
    hidden_size=96,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=24,
    vocab_size=32,
    max_position_embeddings=512,
    layernorm_epsilon=1e-6,
    rotary_base=10000.0,
    share_embeddings_and_output_weights=True,
    add_qkv_bias=True,
)


class TestArchitecture:
    def write(self, folder: Path, **changes) -> Path:
        values = {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
            "vocab_size": 32,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
        }
        (folder / "config.json").write_text(json.dumps(values | changes), encoding="utf-8")
        return folder

    def test_reads_the_figures(self, tmp_path):
        assert read_architecture(self.write(tmp_path)) == ARCHITECTURE
        assert read_architecture(self.write(tmp_path, head_dim=32)) == replace(ARCHITECTURE, kv_channels=32)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"architectures": ["MambaForCausalLM"]},
                "MambaForCausalLM is not supported; known: Qwen2ForCausalLM",
            ),
            ({"architectures": None}, r"\(none named\) is not supported"),
            ({"hidden_size": None}, "hidden_size has to be a positive integer, not None"),
            ({"num_hidden_layers": "4"}, "num_hidden_layers"),
            ({"num_key_value_heads": 0}, "num_key_value_heads has to be a positive integer, not 0"),
            ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads="),
            (
                {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 128, "head_dim": None},
                "num_attention_heads=5 does not divide hidden_size=128",
            ),
            ({"head_dim": 1.5}, "head_dim has to be a positive integer, not 1.5"),
            ({"vocab_size": True}, "vocab_size has to be a positive integer, not True"),
            ({"architectures": "Qwen2ForCausalLM"}, r"\(none named\) is not supported"),
            ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
            ({"tie_word_embeddings": "false"}, "tie_word_embeddings has to be true or false, not 'false'"),
            ({"tie_word_embeddings": 0}, "tie_word_embeddings has to be true or false, not 0"),
            ({"rms_norm_eps": "1e-6"}, "rms_norm_eps has to be a positive number, not '1e-6'"),
            ({"rms_norm_eps": float("nan")}, "rms_norm_eps has to be a positive number, not nan"),
            ({"initializer_range": None}, "initializer_range has to be a positive number"),
            ({"rope_theta": "10000"}, "rope_theta has to be a positive number, not '10000'"),
            ({"rope_theta": -1.0}, "rope_theta has to be a positive number"),
            ({"rope_parameters": {"rope_theta": None}}, "rope_theta has to be a positive number, not None"),
            ({"rope_parameters": [10000.0]}, "rope_parameters or rope_scaling has to be an object"),
            ({"rope_scaling": "linear"}, "rope_parameters or rope_scaling has to be an object"),
            ({"rope_parameters": {"full_attention": {}}}, "rope_parameters for full_attention are not"),
            ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25 is not supported"),
            ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not"),
            ({"layer_types": ["full_attention"] * 3}, "layer_types=.* is not supported; models need 4 times"),
            ({"layer_types": "full_attention"}, "layer_types='full_attention' is not supported"),
        ],
    )
    def test_refuses_what_it_does_not_know(self, changes, message, tmp_path):
        with pytest.raises(UserError, match=message) as error:
            read_architecture(self.write(tmp_path, **changes))
        assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
        assert "\n" not in str(error.value)

    def test_refuses_what_it_cannot_read(self, tmp_path):
        with pytest.raises(UserError, match="no model folder"):
            read_architecture(tmp_path / "absent")
        with pytest.raises(UserError, match=r"has no config\.json"):
            read_architecture(tmp_path)
        (tmp_path / "config.json").write_text("{", encoding="utf-8")
        with pytest.raises(UserError, match="not valid JSON"):
            read_architecture(tmp_path)
        (tmp_path / "config.json").write_text("[]", encoding="utf-8")
        with pytest.raises(UserError, match="JSON object"):
            read_architecture(tmp_path)
