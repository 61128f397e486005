"""Faults in the loss path, and the tests that have to notice each."""

from tests.mutation.mutant import Mutant

SCAN = "objective/test_future_kl.py::test_megatron_layouts"
ANY_CUT = "objective/test_future_kl.py::test_any_cut_gives_the_definition"
GOLDEN = "objective/test_golden.py::test_matches_the_reference"
LOSS = "objective/test_loss.py::test_no_split_changes_loss_or_gradient"
HEAD_TESTS = "distributed/test_head.py"
HEAD = f"{HEAD_TESTS}::test_values_and_gradients_equal_full_logits"
GRID = "distributed/test_policy_grid.py::test_loss_and_every_gradient_equal_the_oracle"
FIRST_STEP = "distributed/test_policy_grid.py::test_first_mini_step_reproduces_old_log_probs_bit_for_bit"
COLLECTIVES = "distributed/test_loss_path.py::test_the_collectives_of_a_micro_batch_and_their_bytes"
CORRECTION = "objective/test_correction.py"
WEIGHED = "test_every_token_is_weighed_and_nothing_else_changes"
SPREAD = "test_statistics_are_their_definitions_however_the_tokens_are_spread"
NO_ROWS = "distributed/test_loss_path.py::test_ranks_without_rows_take_part_in_every_collective"
NO_WAIT = "distributed/test_loss_path.py::test_neither_forward_nor_backward_waits_for_the_device"
MEMORY = "distributed/test_loss_path.py::test_nothing_as_large_as_the_logits_is_made_or_kept"


FUTURE_KL, LOSS_FILE, PLAN = "objective/future_kl.py", "objective/loss.py", "objective/scan_layout.py"
SEQUENCES = "objective/drop_rule.py"
CORRECTION_FILE, STATISTICS = "objective/correction.py", "objective/metrics.py"
SHARD, HEAD_FILE, PASSES, POLICY = (
    "batching/shard.py",
    "model/logprob_head/head.py",
    "model/logprob_head/torch_passes.py",
    "trainer/rank_model.py",
)

MUTANTS = (
    Mutant(
        "context-parallel carry left out",
        FUTURE_KL,
        " + _power(plan.row_distance, rate) * later_chunks.view(-1)[plan.row_segment]",
        "",
        (SCAN, LOSS, f"{GRID}[cp2-fipo", NO_ROWS),
    ),
    Mutant(
        "carry decays by one position too many",
        PLAN,
        "distance = table.first[:, :, :, None] - (first + length)[None, :, None, :]\n",
        "distance = table.first[:, :, :, None] - (first + length)[None, :, None, :]\n    distance = distance + (distance > 0)\n",
        (SCAN, LOSS, f"{GRID}[cp2-fipo"),
    ),
    Mutant(
        "labels shifted after the context-parallel slicing",
        SHARD,
        "labels=torch.from_numpy(packed.ids[row_token + 1])",
        "labels=torch.from_numpy(packed.ids[local[np.minimum(row_index + 1, len(local) - 1)]])",
        (
            "batching/test_shard.py::test_the_ranks_together_hold_every_token_and_every_row_once",
            f"{GRID}[cp2-fipo",
            NO_ROWS,
        ),
    ),
    Mutant(
        "denominator counts dropped tokens",
        LOSS_FILE,
        '"kept_tokens": kept,',
        '"kept_tokens": torch.ones_like(kept),',
        (LOSS, f"{GRID}[1-fipo-False-160"),
    ),
    Mutant(
        "denominator is the rank's own",
        POLICY,
        "loss.loss_sum,\n        loss.normalizer.to(torch.int32),",
        "loss.loss_sum / loss.normalizer.clamp(min=1),\n        torch.ones_like(loss.normalizer, dtype=torch.int32),",
        (f"{GRID}[1-fipo-False-160", f"{GRID}[cp2-fipo", f"{GRID}[dp2-fipo"),
    ),
    Mutant(
        "tensor parallel: gradient of hidden states not summed",
        HEAD_FILE,
        "rows = copy_to_tensor_model_parallel_region(rows, group=tensor_parallel_group)",
        "pass",
        (HEAD, f"{GRID}[tp2-fipo", f"{COLLECTIVES}[tp2", f"{NO_ROWS}[tp2-cp2"),
    ),
    Mutant(
        "sequence parallel: gradient of hidden states not summed",
        HEAD_FILE,
        "tensor_parallel_output_grad=True",
        "tensor_parallel_output_grad=False",
        (HEAD, f"{GRID}[tp2-sp-fipo", f"{COLLECTIVES}[tp2-sp", f"{NO_ROWS}[tp2-sp-cp2"),
    ),
    Mutant(
        "tensor parallel: sums of exponentials not summed",
        HEAD_FILE,
        "    dist.all_reduce(sums, group=group)\n",
        "",
        (HEAD, f"{GRID}[tp2-fipo", f"{COLLECTIVES}[tp2", f"{NO_ROWS}[tp2-cp2"),
    ),
    Mutant(
        "tensor parallel: maximum not shared",
        HEAD_FILE,
        "    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)\n",
        "",
        (HEAD, f"{GRID}[tp2-fipo", f"{COLLECTIVES}[tp2"),
    ),
    Mutant(
        "one dual-clipped token drops",
        SEQUENCES,
        "(counts[:, 1] > 1)",
        "(counts[:, 1] > 0)",
        (LOSS, GOLDEN, f"{GRID}[1-fipo"),
    ),
    Mutant(
        "dual-clipped tokens counted per rank",
        FUTURE_KL,
        "totals.sum(dim=0)",
        "sums",
        (f"{LOSS}[2-zigzag", f"{GRID}[cp4-fipo"),
    ),
    Mutant(
        "dual-clipped tokens stay in FutureKL",
        LOSS_FILE,
        "torch.where(inlier, tokens.log_ratio.detach(), 0.0)",
        "tokens.log_ratio.detach()",
        (GOLDEN, LOSS),
    ),
    Mutant(
        "the filter of FutureKL cannot be switched off",
        "objective/config.py",
        "math.log(self.dual_clip) if self.filter_future_kl else math.inf",
        "math.log(self.dual_clip)",
        (LOSS, "objective/test_padded.py::test_the_filter_of_future_kl_can_be_switched_off"),
    ),
    Mutant(
        "safety rule without its low bound",
        LOSS_FILE,
        "influence.clamp(*SAFE_INFLUENCE)",
        "influence.clamp(max=SAFE_INFLUENCE[1])",
        ("objective/test_loss.py::test_the_safety_rule_has_a_low_bound",),
    ),
    Mutant(
        "decay counts rows, not positions (holes)",
        PLAN,
        "levels = _build_levels(segment, position - span_start[segment], width)",
        "levels = _build_levels(segment, torch.arange(len(segment)) - torch.searchsorted(segment, segment), width)",
        (SCAN, LOSS, f"{GRID}[1-fipo-False-160"),
    ),
    Mutant(
        "safety rule on positive advantages",
        LOSS_FILE,
        "unsafe = (tokens.advantages < 0)",
        "unsafe = (tokens.advantages > 0)",
        (GOLDEN, LOSS, f"{GRID}[1-fipo-False-160"),
    ),
    Mutant(
        "dual clip on positive advantages",
        LOSS_FILE,
        "torch.where(advantages < 0, torch.minimum(loss, bound), loss)",
        "torch.where(advantages > 0, torch.minimum(loss, bound), loss)",
        (GOLDEN, LOSS, f"{GRID}[1-fipo-False-160"),
    ),
    Mutant(
        "temperature not applied",
        HEAD_FILE,
        "inverse_temperature=1.0 / request.temperature",
        "inverse_temperature=1.0",
        (HEAD, f"{GRID}[1-fipo-False-160"),
    ),
    Mutant(
        "temperature missing in backward",
        PASSES,
        "mul_(-row * gradient.inverse_temperature)",
        "mul_(-row)",
        (HEAD, f"{GRID}[1-fipo-False-160"),
    ),
    Mutant(
        "padded vocabulary is included",
        PASSES,
        "    logits[:, slab.words :] = PADDED_LOGIT\n",
        "",
        (HEAD, f"{GRID}[tp2-fipo"),
    ),
    Mutant(
        "parameters not marked as tensor parallel",
        "model/build.py",
        "perform_initialization=True,",
        "perform_initialization=False,",
        (
            f"{GRID}[tp2-fipo",
            "distributed/test_policy_grid.py::test_updated_weights_equal_those_of_one_rank[tp2",
        ),
    ),
    Mutant(
        "norms and biases decayed",
        POLICY,
        'self.weight_decay * group.get("wd_mult", 1.0)',
        "self.weight_decay",
        ("distributed/test_update.py::test_the_update_is_adamw_without_decay_of_norms_and_biases",),
    ),
    Mutant(
        "gradient not clipped",
        POLICY,
        "if self.clip_grad > 0:",
        "if False:",
        ("distributed/test_update.py::test_the_gradient_is_clipped_to_the_bound",),
    ),
    Mutant(
        "a NaN reaches the loss",
        LOSS_FILE,
        "return torch.where(usable, value, 0.0)",
        "return torch.where(mask, value, 0.0)",
        ("objective/test_loss.py::test_a_non_finite_number_stays_in_its_response",),
    ),
    Mutant(
        "correction: weight not capped",
        CORRECTION_FILE,
        "return weight.clamp(max=objective.correction_cap)",
        "return weight",
        (f"{CORRECTION}::test_by_hand[tis", f"{CORRECTION}::{WEIGHED}", LOSS, f"{GRID}[1-tis"),
    ),
    Mutant(
        "correction: mask keeps tokens beyond the cap",
        CORRECTION_FILE,
        "torch.where(weight <= objective.correction_cap, weight, 0.0)",
        "weight.clamp(max=objective.correction_cap)",
        (f"{CORRECTION}::test_by_hand[mis", f"{CORRECTION}::{WEIGHED}", LOSS, f"{GRID}[cp2-mis"),
    ),
    Mutant(
        "correction: trainer and engine exchanged",
        CORRECTION_FILE,
        "torch.where(known, old_log_probs - rollout_log_probs, 0.0)",
        "torch.where(known, rollout_log_probs - old_log_probs, 0.0)",
        (f"{CORRECTION}::test_by_hand", f"{CORRECTION}::{SPREAD}", LOSS, f"{GRID}[1-tis"),
    ),
    Mutant(
        "correction: weight of the new policy, not of the old",
        LOSS_FILE,
        "mismatch=compare(rows.old_log_probs, rows.rollout_log_probs, usable)",
        "mismatch=compare(log_probs, rows.rollout_log_probs, usable)",
        (f"{CORRECTION}::{WEIGHED}", f"{CORRECTION}::{SPREAD}", LOSS, f"{GRID}[1-tis"),
    ),
    Mutant(
        "correction: FutureKL and ratio against the engine",
        LOSS_FILE,
        "log_ratio = contained(log_probs - rows.old_log_probs)",
        "log_ratio = contained(log_probs - (rows.rollout_log_probs if objective.corrects else rows.old_log_probs))",
        (f"{CORRECTION}::{WEIGHED}", LOSS, f"{GRID}[1-tis"),
    ),
    Mutant(
        "correction: KL term weighted too",
        LOSS_FILE,
        "    loss = surrogate\n    if objective.kl_coefficient:\n        loss = loss + objective.kl_coefficient * tokens.reference_kl\n",
        "    loss = surrogate\n    if objective.kl_coefficient:\n"
        "        weight = correction_factor(tokens.mismatch.weight, objective) if objective.corrects else 1.0\n"
        "        loss = loss + weight * objective.kl_coefficient * tokens.reference_kl\n",
        (LOSS,),
    ),
    Mutant(
        "correction: applied although it is off",
        LOSS_FILE,
        "    if objective.corrects:\n        loss = correction",
        "    if True:\n        loss = correction",
        (
            f"{CORRECTION}::test_without_correction_the_engine_changes_no_bit_of_the_loss",
            LOSS,
            f"{GRID}[1-fipo-False-160",
        ),
    ),
    Mutant(
        "correction: denominator excludes masked tokens",
        LOSS_FILE,
        '"kept_tokens": kept,',
        '"kept_tokens": kept * (correction_factor(tokens.mismatch.weight, objective) > 0 if objective.corrects else 1),',
        (
            f"{CORRECTION}::test_tokens_left_out_by_the_mask_still_count",
            f"{CORRECTION}::{WEIGHED}",
            f"{GRID}[cp2-mis",
        ),
    ),
    Mutant(
        "correction: a NaN of the engine goes unnoticed",
        LOSS_FILE,
        "rollout_log_probs = rows.rollout_log_probs if objective.corrects else None",
        "rollout_log_probs = None",
        (
            f"{CORRECTION}::test_a_broken_log_prob_of_the_engine_takes_out_its_response_only",
            "objective/test_loss.py::test_a_non_finite_number_stays_in_its_response",
        ),
    ),
    Mutant(
        "correction: a NaN of the engine reaches the statistics",
        CORRECTION_FILE,
        "known = usable & rollout_log_probs.isfinite()",
        "known = usable",
        (f"{CORRECTION}::test_without_correction_the_engine_changes_no_bit_of_the_loss",),
    ),
    Mutant(
        "correction: the engine's log-prob of the token, not of its label",
        SHARD,
        "torch.from_numpy(packed.rollout_log_probs[row_token])",
        "torch.from_numpy(packed.rollout_log_probs[row_token - 1])",
        (
            "batching/test_shard.py::test_the_ranks_together_hold_every_token_and_every_row_once",
            f"{GRID}[1-tis",
        ),
    ),
    Mutant(
        "correction: effective sample size not divided by the tokens",
        STATISTICS,
        't["importance"].square(), t["compared_tokens"] * t["importance_squared"]',
        't["importance"].square(), t["importance_squared"]',
        (f"{CORRECTION}::{SPREAD}", f"{CORRECTION}::test_statistics_at_the_ends"),
    ),
    Mutant(
        "a NaN row reaches the head's gradient",
        PASSES,
        "    result.masked_fill_(~gradient.active().unsqueeze(1), 0)\n",
        "",
        (f"{HEAD_TESTS}::test_a_row_without_gradient_contains_its_own_nan",),
    ),
    Mutant(
        "a NaN row's hidden state reaches the weight's gradient",
        HEAD_FILE,
        "hidden.masked_fill_(~gradient.active().unsqueeze(1), 0)",
        "pass",
        (f"{HEAD_TESTS}::test_a_row_without_gradient_contains_its_own_nan",),
    ),
    Mutant(
        "slabs: the moment keeps the peak of the slabs before",
        PASSES,
        "(moment + shift * total) * scale",
        "moment * scale",
        (HEAD,),
    ),
    Mutant(
        "slabs: labels at a border belong to both",
        PASSES,
        "(local < slab.words)",
        "(local <= slab.words)",
        (HEAD,),
    ),
    Mutant(
        "kept logits: temperature applied twice",
        HEAD_FILE,
        "scale, shift = 1.0, peak - log_partition",
        "scale, shift = vocab_slice.inverse_temperature, peak - log_partition",
        (HEAD,),
    ),
    Mutant(
        "main_grad: a tied weight gets no zeros",
        HEAD_FILE,
        'if getattr(self.weight, "zero_out_wgrad", False) or self.weight.grad is not None:',
        "if self.weight.grad is not None:",
        (f"{HEAD_TESTS}::test_through_megatrons_data_parallel_wrapper", f"{GRID}[1-fipo-True-160"),
    ),
    Mutant(
        "main_grad: the placeholder of a gradient is added to the previous one",
        HEAD_FILE,
        " or self.weight.grad is not None:",
        ":",
        (f"{HEAD_TESTS}::test_the_weights_gradient_is_added_to_main_grad",),
    ),
    Mutant(
        "old log-probs scored in another order",
        POLICY,
        "shards, lambda shard: collect, forward_only=True,",
        "shards[::-1], lambda shard: collect, forward_only=True,",
        (FIRST_STEP,),
    ),
    Mutant(
        "the host reads a number",
        LOSS_FILE,
        '"kept_tokens": kept,',
        '"kept_tokens": torch.full_like(kept, kept.sum().item() / max(len(kept), 1)),',
        (NO_WAIT, COLLECTIVES, "objective/test_no_host_sync.py::test_the_packed_loss_never_syncs"),
    ),
    Mutant(
        "a second all-gather in the scan",
        FUTURE_KL,
        "    gathered = all_gather(torch.cat([at_chunk_start, sums], dim=1), group)",
        "    all_gather(sums, group)\n    gathered = all_gather(torch.cat([at_chunk_start, sums], dim=1), group)",
        (COLLECTIVES, NO_ROWS, "objective/test_loss.py::test_one_all_gather_of_constant_size"),
    ),
    Mutant(
        "a rank without rows skips the scan's collective",
        FUTURE_KL,
        "    check_group(plan, group)\n    if takes",
        "    check_group(plan, group)\n    if not plan.num_rows:\n"
        "        return x, extra_sums.new_zeros(plan.num_sequences, 2)\n    if takes",
        (NO_ROWS,),
    ),
    Mutant(
        "every slab's logits kept",
        HEAD_FILE,
        "if index < vocab_slice.kept_slabs:\n                keep =",
        "if True:\n                keep =",
        (MEMORY, f"{HEAD_TESTS}::test_kept_logits_are_bounded_by_the_budget_and_absent_by_default"),
    ),
)
