"""One case to plan: a configuration, its model, a machine and assumed responses. Every function of `plan` takes one."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_fipo.config import Config, with_placement
from megatron_fipo.errors import UserError
from megatron_fipo.families.family import Architecture, Family
from megatron_fipo.plan.machine import Machine
from megatron_fipo.plan.workload import Assumptions, Workload, length_law

DEFAULT_SHARE_OF_LIMIT = 0.45
"""Mean response length as a share of the limit, if none is given."""
DEFAULT_PROMPT = 160.0
"""Mean prompt length in tokens, if none is given."""
DEFAULT_EXPERT_LOAD = 1.2
"""Tokens of the fullest expert-parallel rank over the mean, if none is given."""


@dataclass(frozen=True)
class Case:
    """What is planned. The configuration is valid (`config.rules.validate`), and its placement is decided."""

    config: Config
    family: Family
    architecture: Architecture
    machine: Machine
    assumptions: Assumptions = field(default_factory=Assumptions)
    scoring_passes: int = 1
    """Forward passes over the batch before the updates: old log-probs, and a reference policy."""

    @property
    def trainer_devices(self) -> int:
        return self.config.parallel.world_size

    @property
    def engine_devices(self) -> int:
        """GPUs that the engines use; with `placement=colocated` they are the trainer's."""
        rollout = self.config.rollout
        return rollout.num_engines * rollout.engine_tensor_parallel_size

    @property
    def devices(self) -> int:
        """GPUs of the run."""
        if self.colocated:
            return max(self.trainer_devices, self.engine_devices)
        return self.trainer_devices + self.engine_devices

    @property
    def colocated(self) -> bool:
        return self.config.rollout.colocated

    @property
    def expert_load(self) -> float:
        """Tokens that the fullest expert-parallel rank gets, over the mean of the ranks."""
        return self.assumptions.expert_load or DEFAULT_EXPERT_LOAD

    def workload(self, progress: float = 1.0) -> Workload:
        """The responses of an iteration; progress 0 is the start of training and 1 its end, lengths grow linearly.

        UserError for a mean length above its limit, and if `rollout.max_prompts` prompts give no group to train on.
        """
        assumed, batch, limit = self.assumptions, self.config.batch, self.config.rollout.max_response_length
        prompt_limit = self.config.rollout.max_prompt_length
        prompt = assumed.prompt_tokens or min(DEFAULT_PROMPT, prompt_limit)
        if prompt > prompt_limit:
            raise UserError(
                f"a mean prompt of {prompt:,.0f} tokens is above rollout.max_prompt_length={prompt_limit}"
            )
        end = assumed.response_end or DEFAULT_SHARE_OF_LIMIT * limit
        start = assumed.response_start or end
        mean = start + progress * (end - start)
        if max(start, end) > limit:
            raise UserError(
                f"a mean response of {max(start, end):,.0f} tokens is above rollout.max_response_length={limit}"
            )
        spread = (assumed.prompt_spread**2 + assumed.response_spread**2) ** 0.5
        most = self.config.rollout.max_prompts
        prompts = min(batch.prompts_per_iteration / assumed.informative, most)
        groups = min(batch.prompts_per_iteration, round(prompts * assumed.informative))
        if groups == 0:
            raise UserError(
                f"--informative {assumed.informative:g} leaves no group to train on of rollout.max_prompts={most} prompts; "
                "raise one of them"
            )
        return Workload(
            prompt_tokens=prompt,
            response=length_law(mean, spread, limit),
            informative=assumed.informative,
            trained=groups * batch.responses_per_prompt,
            sampled=round(prompts * batch.responses_per_prompt),
        )

    @property
    def sends_weights_over_host(self) -> bool:
        """As `weight_sync.transport` chooses: NCCL needs vLLM, and engines on GPUs of their own."""
        return self.colocated or self.config.rollout.engine != "vllm" or self.machine.on_cpu

    @property
    def held_out_samples(self) -> list[int]:
        """Responses to each problem of one evaluation: to those of all sets, or without files to those that the task generates."""
        evaluation, assumed = self.config.evaluation, self.assumptions.evaluation_problems
        if not evaluation.sets:
            return [evaluation.samples_per_problem] * self.config.data.evaluation_size
        return [evaluation.samples_of(name) for name in evaluation.sets for _ in range(assumed)]

    def changed(self, **sections: Mapping[str, Any]) -> "Case":
        """The same case with some settings of some sections of its configuration: `changed(model={"recompute": "full"})`."""
        replaced = {name: replace(getattr(self.config, name), **values) for name, values in sections.items()}
        return replace(self, config=replace(self.config, **replaced))

    def at(self, tokens: float) -> "Case":
        """The same case with responses of this mean length throughout."""
        assumptions = replace(self.assumptions, response_start=tokens, response_end=tokens)
        return replace(self, assumptions=assumptions)


def case_of(
    config: Config,
    family: Family,
    architecture: Architecture,
    machine: Machine,
    assumptions: Assumptions,
    gpus: int = 0,
) -> Case:
    """The case of a configuration as it is: GRPO's KL term scores the batch with a reference policy too.

    `gpus` decide `rollout.placement=auto`: those that the run has; 0 if there will be as many as it needs.
    What is not assumed gets its default, so that a plan can print it. UserError for a mean length above its limit.
    """
    case = Case(
        with_placement(config, gpus),
        family,
        architecture,
        machine,
        assumptions,
        scoring_passes=2 if config.objective.kl_coefficient else 1,
    )
    end = case.workload()
    resolved = replace(assumptions, prompt_tokens=end.prompt_tokens, response_end=end.response.mean)
    if architecture.experts is not None:
        resolved = replace(resolved, expert_load=case.expert_load)
    return replace(case, assumptions=resolved)
