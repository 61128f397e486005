"""Both engines write the greedy text of transformers with a real language model, SmolLM2-135M-Instruct."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams
from megatron_fipo.engine.vllm_engine import VLLMEngine
from tests.generations import ids
from tests.smollm.real_model import FOLDER, needs_smollm, prompts, tokenizer

pytestmark = [needs_smollm, pytest.mark.slow]

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=48)


@pytest.fixture(scope="module")
def requests() -> list[GenerationRequest]:
    return [GenerationRequest(f"request-{index}", prompt, index) for index, prompt in enumerate(prompts(4))]


@pytest.fixture(scope="module")
def texts(requests) -> list[str]:
    """What transformers generates for each prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    answers = [
        model.generate(
            torch.tensor([request.prompt_ids]), max_new_tokens=GREEDY.max_new_tokens, do_sample=False
        )
        for request in requests
    ]
    return [
        tokenizer().decode(answer[0, len(request.prompt_ids) :])
        for request, answer in zip(requests, answers, strict=True)
    ]


def decoded(generations) -> list[str]:
    return [tokenizer().decode(ids(generation)) for generation in generations]


def test_the_local_engine_writes_the_text_of_transformers(requests, texts):
    engine = LocalEngine(str(FOLDER), "float32")
    engine.ready()
    assert decoded(engine.generate(requests, GREEDY)) == texts
    assert all(len(text) > 40 for text in texts)


def test_vllm_writes_the_text_of_transformers(requests, texts, run):
    engine = VLLMEngine(str(FOLDER), "float32", max_model_len=512)
    run(engine.ready())
    try:
        assert decoded(run(engine.generate(requests, GREEDY))) == texts
    finally:
        engine._llm.shutdown()
