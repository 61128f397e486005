"""Load a Hugging Face model folder for a rollout engine, or refuse it."""

from typing import Any

from megatron_fipo.checkpoint.hf_config import load_hf_config
from megatron_fipo.checkpoint.model_folder import open_model_folder, read_description
from megatron_fipo.checkpoint.tokenizer import load_tokenizer
from megatron_fipo.errors import UserError, first_line
from megatron_fipo.families.fused_experts import separate


def load_model(
    path: str, dtype: str, trust_remote_code: bool, load_weights: bool
) -> tuple[Any, frozenset[int]]:
    """The model on the current device, and the ids of the tokens that end a response.

    Without `load_weights` the weights in the folder are not read and those of the model are undefined. With
    it they are checked in memory after loading (some 10 s for 64 GB).

    UserError as `open_model_folder` (with `load_weights`), `load_hf_config` and `load_tokenizer`; if
    transformers cannot build or load the model or builds one of other sizes; for NaN or infinite weights.
    """
    from megatron_fipo.checkpoint.finite import refuse_not_finite

    family, architecture = read_description(path)
    if load_weights:
        open_model_folder(path)
    config = load_hf_config(path, trust_remote_code)  # first: the tokenizer's class reads config.json too
    _, end_ids = load_tokenizer(path, trust_remote_code, architecture.vocab_size)
    try:
        model = _from_transformers(path, config, dtype, trust_remote_code, load_weights)
    except Exception as error:  # the error of a damaged folder depends on the damage
        raise UserError(f"the rollout engine can't read model.path {path}: {first_line(error)}") from error
    tensors = separate(model.state_dict())
    for weight in family.weights(architecture):
        for name, shape in zip(weight.names, weight.shapes, strict=True):
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != shape:
                raise UserError(
                    f"config.json in {path} is read in two ways: transformers builds {name} in shape {found}, "
                    f"not {shape}; state its sizes as transformers saves them"
                )
    if load_weights:
        refuse_not_finite(path, tensors.items())
    return model, end_ids


def _from_transformers(
    path: str, config: Any, dtype: str, trust_remote_code: bool, load_weights: bool
) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if load_weights:
        return AutoModelForCausalLM.from_pretrained(path, config=config, local_files_only=True, **options)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()
    return model
