"""Small wrong kernels, each with the check that must kill it: a plugin, declared without torch.

With this folder's parent on PYTHONPATH, any of them is asked by the ordinary command:

    pytest --pyargs picotron_conformance --picotron-backend norm=mutants/eps_dropped
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from picotron_core.registry import Backend, Level, Reason, Request, hookimpl, kernel_from
from picotron_mutants import declarations
from picotron_mutants.declarations import without


@dataclass(frozen=True, slots=True)
class Mutant:
    """A wrong kernel at `picotron_mutants.<op>:<name>`.

    killed_by: the family of checks that must fail it.
    what: what it does wrong.
    slow: only the full profile has a case that is large enough.
    claims: fields of its `Backend`, where what it claims is what is wrong.
    """

    op: str
    name: str
    killed_by: str
    what: str
    slow: bool = False
    claims: Mapping[str, Any] = field(default_factory=dict)


def _table(
    op: str, killed_by: str, rows: Mapping[str, str], *, slow: bool = False, **claims: Any
) -> Iterator[Mutant]:
    """One mutant a row, name -> what it does wrong."""
    return (Mutant(op, name, killed_by, what, slow, claims) for name, what in rows.items())


RIGHT_ATTENTION = kernel_from("picotron_mutants.flash:right")

MUTANTS: tuple[Mutant, ...] = (
    *_table(
        "attention",
        "forward",
        {
            "scale_of_padded_width": "1/sqrt of D padded to a power of two",
            "scale_ignored": "an explicit scale changes nothing",
            "scale_always_positive": "a negative scale loses its sign",
            "query_scaled_in_16_bits": "q times scale is rounded to bfloat16 before the product",
            "width_tail_dropped": "D is cut to a multiple of eight",
            "width_beyond_128_dropped": "the logits sum over the first 128 of D",
            "logits_in_16_bits": "logits in bfloat16, claimed as tier A",
            "logits_capped": "a soft cap of 50 is left in",
            "logits_clamped": "logits clamped to +-30",
            "positions_biased": "later keys weigh a little more",
            "products_in_tf32": "float32 operands cut to TF32, claimed as tier A",
            "causal_strict": "a query does not see its own key",
            "causal_one_ahead": "a query sees the next key",
            "causal_top_left": "query t stands at position t when T != S",
            "causal_top_left_when_fewer_keys": "the same where S < T alone",
            "causal_always": "causal=False is ignored",
            "one_query_sees_all": "T = 1 knows neither window nor documents",
            "first_key_always_seen": "key 0 is visible to all, as an attention sink",
            "mask_of_minus_1e4": "hidden logits are -1e4, not -inf",
            "mask_in_last_tile_alone": "only the last tile of keys is masked, right for T = S",
            "tiles_skipped_by_query_index": "keys are skipped by t, not by t + S - T",
            "large_tiles_skipped_by_query_index": "the same with tiles of 64",
            "window_skips_by_last_row": "a block skips tiles that its first query still sees",
            "window_one_short": "a window of w - 1",
            "window_one_long": "a window of w + 1",
            "window_symmetric": "half of the window lies behind",
            "window_ignored": "the window changes nothing",
            "window_ignored_unless_square": "the window is ignored when T != S",
            "window_ignored_with_documents": "the window is ignored beside doc_ids",
            "documents_ignored_with_window": "doc_ids are ignored beside a window",
            "documents_ignored_unless_causal": "doc_ids are ignored without causal",
            "causal_ignored_with_documents": "causal is ignored beside doc_ids",
            "documents_of_first_batch": "all sequences take the doc_ids of the first",
            "documents_by_head_and_batch": "masks repeated as (heads, batch)",
            "documents_of_first_tokens": "query t takes the id of key t when T < S",
            "documents_in_float32": "ids are compared as float32",
            "documents_in_int32": "ids are compared in their low 32 bits",
            "documents_in_order": "ids are compared with <=",
            "negative_documents_are_padding": "an id below 0 is hidden from itself",
            "documents_read_with_stride_1": "strided doc_ids are read as if dense",
            "query_offset_ignored": "an offset changes nothing",
            "query_offset_one_more": "queries stand one position later than the offset",
            "query_offset_negated": "the offset has the wrong sign",
            "query_offset_zero_is_none": "`offset or S - T`: 0 is taken for None",
            "query_offset_from_the_end": "the offset is counted from S - T on",
            "query_offset_never_negative": "an offset below 0 is taken for 0",
            "query_offset_among_the_keys": "no query stands beyond the last key",
            "query_offset_ignored_when_square": "the offset is ignored when T = S",
            "query_offset_ignored_unless_square": "the offset is ignored when T != S",
            "query_offset_ignored_in_decoding": "the offset is ignored when T = 1",
            "query_offset_ignored_with_documents": "the offset is ignored beside doc_ids",
            "query_offset_ignored_with_a_window": "the offset is ignored beside a window",
            "window_without_query_offset": "the offset shifts the diagonal, and not the window",
            "causal_without_query_offset": "the offset shifts the window, and not the diagonal",
            "window_bound_overflows": "the first key, position - window + 1, wraps around",
            "tiles_skipped_without_query_offset": "keys are skipped by t + S - T for any offset",
            "large_tiles_skipped_without_query_offset": "the same with tiles of 128",
            "mask_remembered_for_any_offset": "the first mask of a shape serves other offsets",
            "query_documents_ignored": "queries take the documents of their positions",
            "query_documents_ignored_when_square": "the same where T = S alone",
            "query_documents_ignored_with_window": "the same beside a window alone",
            "query_documents_ignored_unless_causal": "the same without causal alone",
            "query_documents_of_first_batch": "all sequences take the first one's query_doc_ids",
            "query_documents_read_from_the_offset_on": "query_doc_ids are indexed by position",
            "query_documents_of_the_first_tile": "each block of queries takes the first one's ids",
            "query_documents_meet_the_first_keys": "all tiles have the first one's doc_ids",
            "keys_take_the_documents_of_queries": "query_doc_ids are taken for doc_ids when T = S",
            "query_documents_in_int32": "ids of queries are compared in their low 32 bits",
            "query_documents_read_with_stride_1": "strided query_doc_ids are read as if dense",
            "last_key_dropped": "the last key is never read",
            "tail_tile_dropped": "only whole tiles of 16 keys are read",
            "zeros_unless_whole_tiles": "zeros unless S is a multiple of 16",
            "padded_keys_counted": "the padding of the last tile is in the sum",
            "first_tile_not_cleared": "the running sum starts at 1",
            "sums_not_rescaled": "the weighted sum is not rescaled when the maximum grows",
            "total_not_rescaled": "the sum of weights is not rescaled when the maximum grows",
            "max_not_subtracted": "exp of the bare logits overflows",
            "max_of_last_tile": "the maximum forgets earlier tiles",
            "nan_where_nothing_seen": "0 / 0 where a query sees nothing",
            "mean_where_nothing_seen": "a query that sees nothing takes the mean of v",
            "exp_of_three_terms": "exp errs by one in a thousand",
            "log2e_of_three_digits": "exp2 with log2(e) of three digits",
            "weights_in_fp8": "weights rounded to float8_e4m3",
            "sums_in_16_bits": "the weighted sum is kept in bfloat16 between tiles",
            "total_in_16_bits": "the sum of weights is kept in bfloat16",
            "sums_in_float16": "the weighted sum is kept in float16",
            "truncating_store": "bfloat16 is made by cutting bits off",
            "float16_by_way_of_bfloat16": "float16 inputs lose three bits",
            "one_row_larger": "row 7 is 2 % too large",
            "a_little_larger": "all is larger by a roundoff of bfloat16",
            "returns_float32": "the answer is float32 for 16-bit inputs",
            "kv_head_modulo": "query head h reads h % K",
            "kv_head_over_groups_of_k": "query head h reads h // K",
            "kv_of_first_batch": "all sequences read the first one's keys",
            "batches_beyond_two_dropped": "sequences after the second are 0",
            "heads_beyond_eight_dropped": "heads after the eighth are 0",
            "dense_inputs_assumed": "strides are ignored",
            "dense_rows_assumed": "the last stride is taken for 1",
            "v_read_with_strides_of_k": "v is read with the strides of k",
            "offset_ignored": "a tensor at an odd offset is read one element early",
            "reads_past_the_end": "a key beyond the last is read, with weight 0",
            "nothing_to_do_fails": "an empty batch raises",
            "result_in_other_order": "(B, T, H, D) given out as (B, H, T, D)",
            "lse_of_base_2": "the lse is a binary logarithm",
            "lse_without_max": "the maximum is missing in the lse",
            "lse_unscaled": "the lse is that of unscaled logits",
            "lse_in_16_bits": "the lse is rounded to bfloat16",
            "lse_finite_where_nothing_seen": "the lse of no key is -1e30",
            "lse_of_inputs_dtype": "the lse has the dtype of q",
            "lse_with_one_more_dim": "the lse is (B, H, T, 1)",
            "input_scaled_in_place": "q is multiplied by the scale in place",
            "input_rewritten_unseen": "q is changed through .data and put back but for rounding",
            "output_is_a_view_of_v": "for one key, v itself is given out",
        },
    ),
    *_table(
        "attention",
        "forward",
        {
            "scale_zero_is_default": "`scale or default`: 0.0 is taken for None",
            "keys_beyond_512_dropped": "keys after the 512th are never read",
            "positions_in_float32": "positions beyond 2**24 are rounded",
        },
        slow=True,
    ),
    *_table(
        "attention",
        "gradient",
        {
            "lse_gradient_dropped": "the gradient of the lse goes nowhere",
            "lse_gradient_negated": "the gradient of the lse has the wrong sign",
            "lse_gradient_of_dense_memory": "the gradient of the lse is read without its strides",
            "lse_detached": "the lse has no gradient, though claimed",
            "delta_forgotten": "dlogits without the row sum",
            "delta_in_16_bits": "the row sum of dout times out is rounded to bfloat16",
            "delta_of_first_batch": "all sequences take the first one's row sums",
            "dk_scaled_twice": "dk is scaled by scale squared",
            "dq_not_scaled": "dq lacks the scale",
            "dv_missing": "dv is None",
            "dk_and_dv_swapped": "dk and dv change places",
            "backward_not_causal": "the backward sees ahead",
            "backward_without_window": "the backward knows no window",
            "backward_without_documents": "the backward knows no documents",
            "backward_without_query_offset": "the backward knows no offset",
            "backward_without_query_documents": "the backward knows no query_doc_ids",
            "backward_of_default_scale": "the backward takes 1/sqrt(D) for any scale",
            "backward_drops_tail_tile": "the backward reads whole tiles of 16 keys alone",
            "dv_not_causal": "dv alone sees ahead",
            "dlogits_in_fp8": "dlogits rounded to float8_e5m2",
            "dp_in_16_bits": "dP in bfloat16, claimed as tier A",
            "gradients_summed_in_16_bits": "the sums over tiles are kept in bfloat16",
            "tile_overwrites_gradient": "the last tile's share is all of the gradient",
            "group_summed_in_16_bits": "the heads of a group are added up in bfloat16",
            "gradient_of_last_head_of_group": "dk and dv are those of one head of the group",
            "group_averaged": "the mean over a group instead of the sum",
            "nan_gradient_where_nothing_seen": "-inf minus -inf in the backward",
            "gradient_where_nothing_seen": "rows that see nothing send gradients",
            "dense_upstream_assumed": "the upstream's strides are ignored",
            "dense_upstream_rows_assumed": "the upstream's last stride is taken for 1",
            "upstream_assumed_constant": "one number of the upstream gradient serves a whole row",
            "upstream_changed": "the upstream gradient is written to",
        },
    ),
    *_table(
        "attention",
        "some-gradients",
        {
            "looks_at_q_alone": "k and v get gradients only if q does",
            "gradients_only_if_all_are_wanted": "no gradient where one input wants none",
            "dk_only_if_dq_is_wanted": "dk is zeros where q wants no gradient",
        },
    ),
    *_table(
        "attention",
        "second-derivative",
        {
            "second_derivative_of_constants": "the second derivative goes by way of dout alone",
            "second_derivative_of_constant_results": "the second derivative leaves out and lse out",
        },
    ),
    *_table(
        "attention",
        "repeat",
        {
            "gradient_buffer_kept": "dq, dk and dv are summed into buffers that are cleared once",
            "right_ten_times": "zeros from the eleventh call on",
            "right_but_each_seventh_time": "each seventh call is 5 % off",
        },
    ),
    *_table(
        "attention",
        "kept-results",
        {
            "output_buffer_kept": "a later call overwrites an earlier result",
        },
    ),
    *_table(
        "attention",
        "new-content",
        {
            "remembers_by_shape": "the first answer for a shape is given again",
            "remembers_by_address": "the first answer for an address is given again",
            "remembers_by_checksum": "an answer for equal sums of the inputs is given again",
            "mask_remembered_by_shape": "the first documents of a shape serve all calls",
        },
    ),
    *_table(
        "attention",
        "other-shapes",
        {
            "scratch_too_small": "keys beyond the first call's length are dropped",
        },
    ),
    *_table(
        "attention",
        "interleaved",
        {
            "keeps_the_last_call_alone": "the backward takes the tensors of the last forward",
        },
    ),
    *_table(
        "attention",
        "backward-twice",
        {
            "backward_uses_up_its_tensors": "a second backward finds the lse overwritten",
        },
    ),
    *_table(
        "attention",
        "deterministic",
        {
            "results_of_any_order": "sums in an order that no seed decides, claimed deterministic",
        },
    ),
    *_table(
        "attention",
        "globals",
        {
            "random_numbers_drawn": "a random number is drawn",
            "python_random_seeded": "Python's generator is seeded",
            "generator_seeded": "torch's generator is seeded",
            "default_dtype_changed": "the default dtype becomes bfloat16",
            "threads_changed": "the number of threads changes",
            "grad_mode_left_off": "grad mode stays off",
            "matmul_precision_changed": "the matmul precision becomes medium",
            "deterministic_switched_on": "deterministic algorithms stay on",
            "autocast_left_on": "autocast stays on",
            "flush_denormal_set": "denormals are flushed from now on",
            "tf32_switched_on": "TF32 products are allowed from now on",
            "environment_changed": "an environment variable is set",
            "comparison_patched": "torch.equal always says yes from now on",
        },
    ),
    *_table(
        "attention",
        "poison",
        {
            "tail_never_written": "rows after the last whole tile are never written",
            "blind_rows_never_written": "rows that see nothing are never written",
            "gradient_never_cleared": "gradients are summed into memory as allocated",
        },
    ),
    *_table(
        "attention",
        "nan",
        {
            "nan_swallowed": "a NaN in a logit counts as 0",
            "nan_of_v_swallowed": "a NaN in the answer becomes 0",
            "infinity_swallowed": "an infinite logit becomes 1e4",
            "nan_spread": "one NaN makes all of the answer NaN",
        },
    ),
    *_table(
        "attention",
        "no-gradient",
        {
            "output_wants_gradient_always": "the answer wants a gradient under no_grad",
            "lesser_without_gradient": "a coarser path where no gradient is wanted",
        },
    ),
    *_table(
        "attention",
        "inference",
        {
            "reads_version_counters": "it fails on tensors of inference mode",
        },
    ),
    *_table(
        "attention",
        "memory",
        {
            "quadratic_memory": "all weights at once, claimed linear",
            "quadratic_mask": "the mask is made whole, claimed linear",
            "quadratic_backward": "all dlogits at once, claimed linear",
            "quadratic_for_an_offset": "the mask is made whole for an offset, claimed linear",
            "quadratic_for_query_documents": "the mask is made whole for query_doc_ids",
        },
        memory="linear",
    ),
    *_table(
        "attention",
        "compile",
        {
            "breaks_the_graph": "a branch on a value, claimed to compile",
            "prints_while_compiled": "a graph break, claimed to compile",
            "wrong_when_compiled": "another result under torch.compile",
        },
        compiles=True,
    ),
    *_table(
        "attention",
        "fake-tensor",
        {
            "reads_memory_of_fake_tensors": "it reads the bytes of a fake tensor",
        },
        compiles=True,
    ),
    *_table(
        "attention",
        "own-code",
        {
            "falls_back_to_the_reference": "the kernel is another backend's",
            "falls_back_for_odd_widths": "another backend serves D that is no multiple of eight",
        },
    ),
    *_table(
        "attention",
        "launches",
        {
            "never_launches": "the kernel that it claims to launch never runs",
        },
        launches=("acme::flash_fwd",),
    ),
    *_table(
        "attention",
        "launches",
        {
            "launches_now_and_then": "the claimed kernel runs for some calls alone",
        },
        launches=("*scaled_dot_product*",),
    ),
    *_table(
        "attention",
        "forward",
        {
            "ignores_unclaimed_window": "a window that it does not claim is ignored",
        },
        supports=without("window"),
    ),
    *_table(
        "attention",
        "forward",
        {
            "ignores_unclaimed_documents": "doc_ids that it does not claim are ignored",
        },
        supports=without("doc_ids"),
    ),
    *_table(
        "attention",
        "forward",
        {
            "ignores_unclaimed_query_offset": "an offset that it does not claim is ignored",
        },
        supports=without("offset"),
    ),
    *_table(
        "attention",
        "forward",
        {
            "ignores_unclaimed_query_documents": "query_doc_ids, not claimed, are ignored",
        },
        supports=without("query_doc_ids"),
    ),
    *_table(
        "attention",
        "forward",
        {
            "misaligned_unclaimed_lengths": "T != S, not claimed, is computed wrongly",
        },
        supports=without("cross_length"),
    ),
    *_table(
        "attention",
        "forward",
        {
            "forgets_unclaimed_lse": "an lse that it does not claim is zeros",
        },
        supports=without("lse", "lse_backward"),
    ),
    *_table(
        "attention",
        "gradient",
        {
            "detaches_unclaimed_training": "training, not claimed, gives no gradient",
        },
        supports=declarations.without_training,
    ),
    *_table(
        "attention",
        "contract-errors",
        {
            "arguments_unchecked": "none of the contract's ValueErrors",
            "arguments_asserted": "AssertionError where the contract says ValueError",
            "window_unchecked": "a window of 0, or one without causal, is computed",
            "documents_unchecked": "doc_ids of the wrong shape are computed",
            "query_documents_unchecked": "query_doc_ids of the wrong shape are computed",
            "positions_of_documents_unchecked": "doc_ids serve queries that stand at no key",
            "heads_unchecked": "H that K does not divide is computed",
        },
    ),
    *_table(
        "attention",
        "declaration",
        {
            "supports_raises": "`supports` fails on a size that the request lacks",
        },
        load=RIGHT_ATTENTION,
        supports=declarations.raises,
    ),
    *_table(
        "attention",
        "declaration",
        {
            "supports_changes_its_mind": "`supports` answers otherwise when asked again",
        },
        load=RIGHT_ATTENTION,
        supports=declarations.changes_its_mind,
    ),
    *_table(
        "attention",
        "declaration",
        {
            "supports_gives_no_detail": "a reason without a word",
        },
        load=RIGHT_ATTENTION,
        supports=declarations.gives_no_detail,
    ),
    *_table(
        "attention",
        "declaration",
        {
            "supports_answers_yes": "`supports` returns True",
        },
        load=RIGHT_ATTENTION,
        supports=declarations.answers_yes,
    ),
    *_table(
        "attention",
        "declaration",
        {
            "supports_answers_with_text": "`supports` returns text, not a Reason",
        },
        load=RIGHT_ATTENTION,
        supports=declarations.answers_with_text,
    ),
    *_table(
        "attention",
        "declaration",
        {
            "supports_imports_torch": "`supports` imports torch",
        },
        load=RIGHT_ATTENTION,
        supports=declarations.imports_torch,
    ),
    *_table(
        "attention",
        "declaration",
        {
            "level_raises": "`level` fails on a device that it does not know",
        },
        load=RIGHT_ATTENTION,
        level=declarations.level_raises,
    ),
    *_table(
        "attention",
        "declaration",
        {
            "level_of_text": "`level` returns text",
        },
        load=RIGHT_ATTENTION,
        level=declarations.level_of_text,
    ),
    *_table(
        "attention",
        "declaration",
        {
            "requirement_malformed": "`requires` is not a requirement",
        },
        load=RIGHT_ATTENTION,
        requires=("acme kernels >> 2",),
    ),
    *_table(
        "norm",
        "forward",
        {
            "eps_dropped": "eps is not added",
            "eps_fixed": "eps is 1e-5, whatever is asked",
            "eps_outside_of_root": "eps is added to the root",
            "eps_as_floor": "the mean square is at least eps, instead of plus eps",
            "mean_subtracted": "the mean is subtracted, as in layer norm",
            "sum_not_mean": "the sum of squares, not their mean",
            "mean_of_padded_width": "the mean over E padded to a power of two",
            "mean_over_all_rows": "one mean square for all rows",
            "unbiased_mean": "the sum of squares over E - 1",
            "width_tail_dropped": "squares of whole vectors of eight alone",
            "width_beyond_2048_dropped": "squares of the first 2048 alone",
            "squares_in_16_bits": "squares in the inputs' dtype",
            "squares_overflow_float16": "the mean square of float16 is kept in float16",
            "root_in_16_bits": "1 / root in the inputs' dtype, claimed as tier A",
            "fast_inverse_root": "1 / root by bits and one step of Newton's",
            "root_of_absolute_value": "the mean of |x| for the root of the mean square",
            "weight_positive": "the weight loses its sign",
            "weight_ignored": "the weight is taken for ones",
            "weight_plus_one": "1 + weight, as Gemma does",
            "weight_tail_ignored": "the weight after whole vectors of eight is taken for ones",
            "truncating_store": "bfloat16 is made by cutting bits off",
            "returns_float32": "the answer is float32 for 16-bit inputs",
            "rows_beyond_256_dropped": "rows after the 256th are 0",
            "no_rows_fail": "no rows raise",
            "one_dim_fails": "a single vector raises",
            "dense_input_assumed": "strides are ignored",
            "dense_rows_assumed": "the last stride is taken for 1",
            "joined_rows_assumed": "each row is read right behind the one before",
            "dense_weight_assumed": "the weight's stride is taken for 1",
            "normed_in_place": "x is written to",
        },
    ),
    *_table(
        "norm",
        "gradient",
        {
            "dx_without_correction": "dx lacks the term along x",
            "dx_correction_not_averaged": "the term along x is a sum, not a mean",
            "dx_correction_squared": "r squared where r cubed must be",
            "dx_without_weight": "dx lacks the weight",
            "dx_sums_in_16_bits": "the sum along x in bfloat16",
            "dweight_missing": "dweight is None",
            "dweight_of_x": "dweight of x, not of the normed x",
            "dweight_averaged": "dweight is a mean over rows",
            "dweight_added_in_16_bits": "dweight rounds at each row",
            "dweight_of_last_block": "the last 64 rows are all of dweight",
            "dweight_of_first_sequence": "dweight knows the first sequence alone",
            "dense_upstream_assumed": "the upstream's strides are ignored",
            "dense_upstream_rows_assumed": "the upstream's last stride is taken for 1",
            "upstream_overwritten": "dx is written over the upstream gradient",
        },
    ),
    *_table(
        "norm",
        "some-gradients",
        {
            "weight_alone_gets_no_gradient": "dweight only beside dx",
            "frozen_weight_fails": "the backward raises where the weight is frozen",
        },
    ),
    *_table(
        "norm",
        "repeat",
        {
            "dweight_buffer_kept": "dweight adds to that of earlier calls",
        },
    ),
    *_table(
        "norm",
        "kept-results",
        {
            "output_buffer_kept": "a later call overwrites an earlier result",
        },
    ),
    *_table(
        "norm",
        "new-content",
        {
            "weight_remembered": "a copy of the weight is kept by address",
        },
    ),
    *_table(
        "norm",
        "interleaved",
        {
            "x_of_the_last_call": "the backward takes the x of the last forward",
        },
    ),
    *_table(
        "norm",
        "poison",
        {
            "dweight_not_cleared": "dweight is added to memory as allocated",
            "tail_not_written": "elements after whole vectors of eight are never written",
        },
    ),
    *_table(
        "norm",
        "nan",
        {
            "nan_swallowed": "a NaN becomes 0",
            "nan_of_row_dropped": "a NaN is left out of its row's mean",
        },
    ),
    *_table(
        "norm",
        "second-derivative",
        {
            "wrong_second_derivative": "the second derivative takes r for a constant",
        },
    ),
    *_table(
        "norm",
        "globals",
        {
            "random_numbers_drawn": "a random number is drawn",
        },
    ),
    *_table(
        "norm",
        "own-code",
        {
            "falls_back_for_odd_widths": "another backend serves E that is no multiple of four",
        },
    ),
    *_table(
        "norm",
        "forward",
        {
            "ignores_unclaimed_float16": "float16, not claimed, overflows",
        },
        supports=declarations.without_float16,
    ),
    *_table(
        "rope",
        "forward",
        {
            "pairs_side_by_side": "pairs (2i, 2i + 1) instead of (i, i + D/2)",
            "turned_the_other_way": "the sine has the wrong sign",
            "both_halves_minus": "the second half lacks a sign",
            "second_half_of_turned_first": "the second half reads the first one after its turn",
            "position_off_by_one": "token t takes the angle of t - 1",
            "k_not_turned": "k comes back as it was",
            "k_of_first_position": "k takes the first position's angle",
            "tables_of_first_sequence": "all sequences take the first one's positions",
            "tables_of_first_sequence_for_one_token": "the same for T = 1 alone",
            "tables_along_heads": "tables (T, D/2) run along heads where T = H",
            "batch_of_tables_along_heads": "tables (B, T, D/2) run along heads where B = H",
            "tables_in_bfloat16": "tables rounded to bfloat16 for all dtypes",
            "sine_made_of_cosine": "the sine is made of the cosine",
            "tables_made_of_positions": "the tables are not looked at",
            "tables_read_dense": "the strides of the tables are ignored",
            "sine_read_with_strides_of_cosine": "sin is read with the strides of cos",
            "widths_of_whole_vectors_alone": "pairs after whole vectors of four stay",
            "width_beyond_64_not_turned": "D beyond 64 stays",
            "heads_beyond_four_not_turned": "heads after the fourth stay",
            "tokens_beyond_32_not_turned": "tokens after the 32nd stay",
            "one_token_not_turned": "T = 1 stays",
            "truncating_store": "bfloat16 is made by cutting bits off",
            "returns_float32": "the answer is float32 for 16-bit inputs",
            "dense_inputs_assumed": "strides are ignored",
            "dense_rows_assumed": "the last stride is taken for 1",
            "joined_rows_assumed": "each row is read right behind the one before",
            "q_and_k_swapped": "q and k change places where their shapes agree",
            "turned_in_place": "q itself is turned",
            "input_given_out": "at angle 0 the inputs themselves are returned",
            "tables_remembered_by_length": "the first tables of a length serve all",
        },
    ),
    *_table(
        "rope",
        "gradient",
        {
            "sine_negated_in_place": "the caller's sine is negated and put back",
            "backward_turns_on": "the backward turns the same way",
            "backward_inverts": "the backward divides by cos^2 + sin^2",
            "dk_missing": "dk is None",
            "dk_of_q": "dk is made of dq where nothing is asked of k",
            "both_results_must_be_used": "it raises where one result has no gradient",
            "dense_upstream_assumed": "the upstream's strides are ignored",
            "dense_upstream_rows_assumed": "the upstream's last stride is taken for 1",
            "upstream_turned_in_place": "the upstream gradient is overwritten",
        },
    ),
    *_table(
        "rope",
        "some-gradients",
        {
            "k_alone_gets_no_gradient": "dk only beside dq",
        },
    ),
    *_table(
        "rope",
        "kept-results",
        {
            "output_buffer_kept": "a later call overwrites an earlier result",
        },
    ),
    *_table(
        "rope",
        "interleaved",
        {
            "tables_of_the_last_call": "the backward takes the tables of the last forward",
        },
    ),
    *_table(
        "rope",
        "nan",
        {
            "nan_swallowed": "a NaN becomes 0",
        },
    ),
    *_table(
        "rope",
        "own-code",
        {
            "falls_back_for_few_heads": "another backend serves K = 1",
        },
    ),
    *_table(
        "swiglu",
        "forward",
        {
            "gelu": "gelu for silu",
            "quick_gelu": "x sigmoid(1.702 x) for silu",
            "hard_swish": "hard swish for silu",
            "sigmoid_alone": "sigmoid(gate) up",
            "gate_and_up_swapped": "silu(up) gate",
            "exp_overflows": "exp(x) / (1 + exp(x)) is NaN for large gates",
            "exp_overflows_float16": "exp(-x) leaves float16's range below -11",
            "gate_clamped": "gate and up are clamped to +-80",
            "negative_gates_dropped": "silu is 0 below -7",
            "coarse_sigmoid": "sigmoid of ten bits",
            "truncating_store": "bfloat16 is made by cutting bits off",
            "returns_float32": "the answer is float32 for 16-bit inputs",
            "tail_dropped": "elements after whole blocks of 32 are 0",
            "beyond_8192_dropped": "elements after the 8192nd are 0",
            "rows_need_two_dims": "a single vector raises",
            "nothing_to_do_fails": "an empty tensor raises",
            "dense_inputs_assumed": "strides are ignored",
            "dense_rows_assumed": "the last stride is taken for 1",
            "joined_rows_assumed": "each row is read right behind the one before",
            "up_read_with_strides_of_gate": "up is read with the strides of gate",
            "up_overwritten": "y is written over up",
        },
    ),
    *_table(
        "swiglu",
        "gradient",
        {
            "sigmoid_in_16_bits": "sigmoid in the inputs' dtype, claimed as tier A",
            "slope_without_second_term": "silu' is sigmoid",
            "slope_of_sigmoid": "silu' lacks sigmoid",
            "dgate_without_up": "dgate lacks up",
            "dup_of_gate": "dup of gate, not of silu(gate)",
            "gradients_swapped": "dgate and dup change places",
            "dup_missing": "dup is None",
            "dense_upstream_assumed": "the upstream's strides are ignored",
            "dense_upstream_rows_assumed": "the upstream's last stride is taken for 1",
            "upstream_assumed_constant": "one number of the upstream gradient serves a whole row",
            "upstream_overwritten": "dup is written over the upstream gradient",
            "gradients_written_over_inputs": "dgate and dup are written over gate and up",
        },
    ),
    *_table(
        "swiglu",
        "some-gradients",
        {
            "up_alone_gets_no_gradient": "dup only beside dgate",
        },
    ),
    *_table(
        "swiglu",
        "interleaved",
        {
            "silu_of_the_last_call": "the backward takes the inputs of the last forward",
        },
    ),
    *_table(
        "swiglu",
        "backward-twice",
        {
            "silu_used_up": "the backward overwrites what it needs",
        },
    ),
    *_table(
        "swiglu",
        "kept-results",
        {
            "output_buffer_kept": "a later call overwrites an earlier result",
        },
    ),
    *_table(
        "swiglu",
        "other-shapes",
        {
            "scratch_of_first_size": "elements beyond the first call's number are 0",
        },
    ),
    *_table(
        "swiglu",
        "poison",
        {
            "tail_not_written": "elements after whole blocks of 32 are never written",
        },
    ),
    *_table(
        "swiglu",
        "nan",
        {
            "nan_swallowed": "a NaN gate becomes the minimum of silu",
        },
    ),
    *_table(
        "swiglu",
        "second-derivative",
        {
            "wrong_second_derivative": "the second derivative takes sigmoid for a constant",
        },
    ),
    *_table(
        "swiglu",
        "own-code",
        {
            "falls_back_for_small": "another backend serves fewer than 64 elements",
        },
    ),
    *_table(
        "loss",
        "forward",
        {
            "mean_over_valid": "the mean over valid targets",
            "mean_over_all": "the mean over all targets",
            "nan_without_targets": "0 / 0 where all targets are ignored",
            "no_tokens_fail": "no tokens raise",
            "vector_of_one": "the loss is (1,)",
            "loss_of_inputs_dtype": "the loss has the dtype of hidden",
            "loss_rounded": "the loss is rounded to the dtype of hidden",
            "losses_added_in_16_bits": "the sum over tokens is kept in bfloat16",
            "lse_in_16_bits": "logsumexp in the inputs' dtype, claimed as tier A",
            "exponentials_added_in_16_bits": "exponentials in the inputs' dtype, claimed as tier A",
            "ignores_100_alone": "ignore_index is -100, whatever is asked",
            "ignores_all_negative": "all negative targets are ignored, and no other",
            "ignores_token_0_too": "token 0 counts for nothing",
            "ignores_last_token_too": "tokens after the 15th of a chunk count for nothing",
            "shifts_targets": "target t + 1 is taken for t",
            "ignored_losses_counted": "ignored targets count as token 0",
            "vocabulary_tail_dropped": "logsumexp over whole vectors of eight",
            "vocabulary_beyond_4096_dropped": "logsumexp over the first 4096",
            "vocabulary_padded_with_zeros": "the last tile's padding is logits of 0",
            "max_not_subtracted": "exp of the bare logits overflows",
            "max_of_0_at_least": "the maximum is at least 0",
            "log_of_softmax": "log of a probability that underflows",
            "log_of_softmax_with_floor": "log(p + 1e-9)",
            "label_smoothing": "a label smoothing of 0.01",
            "z_loss_left_in": "1e-4 lse^2 is added",
            "logits_capped": "a soft cap of 30 is left in",
            "logits_in_fp8": "logits rounded to float8_e4m3",
            "width_tail_dropped": "logits of whole vectors of eight of E",
            "last_chunk_dropped": "tokens after whole chunks of 16 count for nothing",
            "dense_inputs_assumed": "strides are ignored",
            "dense_rows_assumed": "the last stride is taken for 1",
            "dense_targets_assumed": "the stride of targets is ignored",
            "targets_overwritten": "ignored targets become 0 in the caller's tensor",
        },
    ),
    *_table(
        "loss",
        "forward",
        {
            "vocabulary_beyond_16_bits_wraps": "targets keep 16 bits",
        },
        slow=True,
    ),
    *_table(
        "loss",
        "no-gradient",
        {
            "loss_only_where_gradient_is_wanted": "the loss is 0 under no_grad",
        },
    ),
    *_table(
        "loss",
        "gradient",
        {
            "upstream_ignored": "the gradients are those of an upstream of 1",
            "upstream_positive": "the upstream loses its sign",
            "upstream_for_hidden_alone": "dweight is that of an upstream of 1",
            "upstream_in_fp8": "the upstream is rounded to float8_e4m3",
            "gradient_of_ignored_tokens": "ignored targets send gradients",
            "ignored_tokens_pull_token_0": "ignored targets pull at token 0",
            "onehot_forgotten": "dlogits is softmax alone",
            "onehot_once_per_token": "shares of chunks are not added up",
            "gradient_averaged": "each chunk's gradient is a mean",
            "dlogits_in_fp8": "dlogits rounded to float8_e5m2",
            "dweight_of_last_chunk": "the last chunk is all of dweight",
            "dweight_added_in_16_bits": "dweight rounds at each chunk of four",
            "dweight_missing": "dweight is None",
        },
    ),
    *_table(
        "loss",
        "some-gradients",
        {
            "frozen_weight_fails": "the backward raises where the weight is frozen",
            "frozen_hidden_stops_weight": "the weight gets no gradient where hidden wants none",
        },
    ),
    *_table(
        "loss",
        "backward-twice",
        {
            "gradients_scaled_in_place": "a second backward scales twice",
        },
    ),
    *_table(
        "loss",
        "interleaved",
        {
            "gradients_of_the_last_call": "the backward gives the last forward's gradients",
            "gradients_given_out_twice": "dhidden lies in a buffer per shape",
        },
    ),
    *_table(
        "loss",
        "repeat",
        {
            "dweight_buffer_kept": "dweight adds to that of earlier calls",
        },
    ),
    *_table(
        "loss",
        "kept-results",
        {
            "loss_buffer_kept": "a later call overwrites an earlier loss",
        },
    ),
    *_table(
        "loss",
        "new-content",
        {
            "remembers_by_shape": "the first answer for a shape is given again",
        },
    ),
    *_table(
        "loss",
        "poison",
        {
            "dhidden_of_ignored_not_written": "dhidden of ignored targets is never written",
        },
    ),
    *_table(
        "loss",
        "nan",
        {
            "nan_swallowed": "a NaN loss counts as 0",
        },
    ),
    *_table(
        "loss",
        "memory",
        {
            "all_logits_at_once": "(N, V) logits, claimed linear",
        },
        memory="linear",
    ),
    *_table(
        "loss",
        "compile",
        {
            "branches_on_targets": "a branch on the targets, claimed to compile",
        },
        compiles=True,
    ),
    *_table(
        "loss",
        "fake-tensor",
        {
            "selects_valid_tokens": "a shape that depends on values, claimed to compile",
        },
        compiles=True,
    ),
    *_table(
        "loss",
        "own-code",
        {
            "falls_back_for_small_vocabularies": "another backend serves V < 64",
        },
    ),
    *_table(
        "loss",
        "globals",
        {
            "numpy_seeded": "numpy's generator is seeded",
        },
    ),
    *_table(
        "optimizer",
        "update",
        {
            "l2_instead_of_decoupled": "the decay goes through the moments",
            "decay_after_update": "p decays after its move",
            "decay_without_rate": "the decay is not multiplied by lr",
            "decay_forgotten": "p does not decay",
            "decay_as_exponential": "exp(-lr wd) for 1 - lr wd",
            "decay_of_matrices_alone": "vectors do not decay",
            "step_from_zero": "the bias corrections lag by a step",
            "step_one_ahead": "the bias corrections are a step ahead",
            "uncorrected": "no bias correction",
            "second_uncorrected": "v has no bias correction",
            "corrections_in_16_bits": "bias corrections in bfloat16",
            "corrections_of_float32_betas": "powers of betas in float16",
            "eps_in_root": "eps inside of the root",
            "eps_squared_in_root": "eps^2 inside of the root",
            "eps_before_correction": "eps is added before v is corrected",
            "eps_fixed": "eps is 1e-8, whatever is asked",
            "eps_dropped": "eps is 0",
            "root_forgotten": "v for its root",
            "betas_swapped": "beta1 and beta2 change places",
            "betas_fixed": "betas are 0.9 and 0.999, whatever is asked",
            "moments_not_weighted": "m takes all of g",
            "second_of_first": "v takes the square of m",
            "moves_by_old_moment": "p moves by the m of the step before",
            "nesterov": "Nesterov's momentum",
            "amsgrad": "v never shrinks",
            "gradient_clipped": "gradients are clipped to +-10",
            "update_clipped": "moves are clipped to +-lr",
            "maximizes": "p climbs",
            "gradient_in_16_bits": "gradients are rounded to bfloat16",
            "first_moment_in_16_bits": "m is kept in bfloat16",
            "second_moment_in_16_bits": "v is kept in bfloat16",
            "parameter_in_16_bits": "p is kept in bfloat16",
            "update_in_16_bits": "the move is rounded to bfloat16",
            "second_moment_by_float16": "g^2 in float16",
            "first_parameter_alone": "the rest of the list stays",
            "last_parameter_missed": "the last of the list stays",
            "no_parameters_fail": "an empty list raises",
            "empty_parameter_fails": "a parameter without elements raises",
            "lists_ended_by_empty_parameter": "what follows a parameter without elements stays",
            "states_zipped_in_reverse": "parameters of one shape take each other's states",
            "elements_beyond_1024_missed": "elements after the 1024th stay",
            "elements_tail_missed": "elements after whole vectors of four stay",
            "dense_parameter_assumed": "the strides of p are ignored",
            "dense_gradient_assumed": "the strides of g are ignored",
            "dense_states_assumed": "the strides of m and v are ignored",
            "copy_of_strided_parameter_updated": "a strided p stays, its copy moves",
            "gradient_decayed_in_place": "g is written to",
            "gradient_cleared": "g is zero afterwards",
            "corrections_of_first_call": "bias corrections are those of the first call",
            "rate_of_first_call": "a parameter's first lr is kept",
            "betas_of_first_call": "a parameter's first betas are kept",
            "eps_of_first_call": "a parameter's first eps is kept",
            "decay_of_first_call": "a parameter's first weight decay is kept",
            "steps_of_its_own_from_the_first": "it counts on from a parameter's first step",
            "uncorrected_after_100": "no bias correction after step 100",
            "uncorrected_after_50000": "no bias correction after step 50000",
            "step_in_12_bits": "the step counts modulo 4096",
            "step_in_bfloat16": "the step sticks at 256",
            "corrections_in_float32": "1 - beta^t in float32",
            "rest_of_beta_in_float32": "1 - beta2 of a float32 beta2",
            "large_gradients_clipped": "finite gradients are clipped to +-1e6",
            "largest_gradients_clipped": "finite gradients are clipped to +-1e15",
            "small_gradients_flushed": "gradients below 1e-15 count as 0",
            "each_storage_once": "a second view of a buffer stays",
            "flat_buffer_in_order_of_list": "views of one buffer are taken to lie in their order",
            "tuples_fail": "tuples of tensors raise",
            "states_by_order_of_names": "the first state is taken for exp_avg",
            "tensors_of_first_call": "a list's first tensors are updated for ever",
            "addresses_of_first_call": "a parameter's first memory is updated for ever",
        },
    ),
    *_table(
        "optimizer",
        "exact",
        {
            "decay_only_with_gradient": "p does not decay where the gradient is 0",
        },
    ),
    *_table(
        "optimizer",
        "arguments",
        {
            "new_states_made": "the states are new tensors in the lists",
            "parameter_moved_to_new_memory": "p lies elsewhere afterwards",
            "step_kept_beside_moments": "a third state is added",
        },
    ),
    *_table(
        "optimizer",
        "other-step",
        {
            "counts_its_own_steps": "the number of the update is its own",
        },
    ),
    *_table(
        "optimizer",
        "exchange",
        {
            "moments_of_its_own": "the moments are kept aside",
            "moments_stored_corrected": "exp_avg holds the corrected moment",
            "second_moment_stored_as_root": "exp_avg_sq holds the root",
        },
    ),
    *_table(
        "optimizer",
        "repeat",
        {
            "right_ten_times": "the rate doubles after ten calls",
        },
    ),
    *_table(
        "optimizer",
        "leaves",
        {
            "graph_kept": "parameters want no gradient afterwards",
            "leaves_fail": "parameters that want a gradient raise",
        },
    ),
    *_table(
        "optimizer",
        "nan",
        {
            "nan_skipped": "a NaN gradient counts as 0",
            "nan_skips_tensor": "a tensor with a NaN gradient stays",
            "infinity_clamped": "an infinite gradient is the largest number",
            "infinity_spreads": "an infinite gradient reaches the elements beside it",
            "nan_in_moments_cleared": "a NaN in exp_avg counts as 0",
            "nan_in_parameter_cleared": "a NaN in a parameter counts as 0",
        },
    ),
    *_table(
        "optimizer",
        "sizes",
        {
            "elements_beyond_2_20_missed": "elements after 2^20 stay",
            "tensors_beyond_512_missed": "tensors after the 512th stay",
        },
    ),
    *_table(
        "optimizer",
        "sizes",
        {
            "elements_beyond_2_24_missed": "elements after 2^24 stay",
            "tensors_beyond_4096_missed": "tensors after the 4096th stay",
        },
        slow=True,
    ),
    *_table(
        "optimizer",
        "reloaded",
        {
            "moments_by_tensor_object": "exp_avg is kept by tensor object",
            "parameters_of_its_own": "parameters are kept by tensor object",
        },
    ),
    *_table(
        "optimizer",
        "leaks",
        {
            "tensor_kept_of_every_call": "a new tensor of each call is kept",
            "gradients_kept": "the gradients of each call are kept",
        },
    ),
    *_table(
        "optimizer",
        "globals",
        {
            "grad_mode_left_off": "grad mode stays off",
        },
    ),
    *_table(
        "optimizer",
        "deterministic",
        {
            "random_rounding": "stochastic rounding, claimed deterministic",
        },
    ),
    *_table(
        "optimizer",
        "own-code",
        {
            "falls_back_for_strided": "another backend serves lists",
        },
    ),
    *_table(
        "comm",
        "all-reduce",
        {
            "nothing_reduced": "each rank keeps its own numbers",
            "averages": "the sum is divided by the world",
            "bfloat16_by_way_of_float16": "bfloat16 is summed as float16",
            "float32_by_way_of_bfloat16": "float32 is summed as bfloat16",
            "int64_by_way_of_float64": "int64 is summed as float64",
            "int32_by_way_of_float32": "int32 is summed as float32",
            "max_is_sum": "the maximum is a sum",
            "max_not_below_zero": "the maximum of negative numbers is 0",
            "beyond_1024_not_reduced": "the first 1024 numbers alone are reduced",
            "remainder_not_reduced": "what does not divide by the world is not reduced",
            "counts_itself_twice": "a rank's own numbers are added twice",
            "result_bound_to_the_tensor": "the tensor gets other memory",
            "dies_of_nothing": "the process ends when there are no numbers",
            "async_min_is_max": "an asynchronous minimum is the maximum",
            "async_int64_by_way_of_float32": "int64 is summed as float32 if asynchronous",
            "async_nothing_fails": "an asynchronous call without numbers raises",
        },
    ),
    *_table(
        "comm",
        "all-reduce",
        {"beyond_2_to_18_not_reduced": "the first 2^18 numbers alone are reduced"},
        slow=True,
    ),
    *_table(
        "comm",
        "all-gather",
        {
            "gathers_backwards": "the last rank comes first",
            "gathers_interleaved": "gathered along another dim",
            "writes_past_the_end": "sizes are rounded up to four",
            "output_in_a_kept_buffer": "the output gets the memory of a buffer",
            "async_gather_of_bytes_lost": "bytes are not gathered if asynchronous",
        },
    ),
    *_table(
        "comm",
        "reduce-scatter",
        {
            "scatters_to_the_neighbour": "each rank gets the slice of the next one",
            "scatter_loses_the_tail": "the last number is not written",
            "scatter_reduces_its_input": "the input is reduced in place",
            "scatter_knows_only_sums": "max and min are sums",
            "async_scatter_is_a_sum": "max and min are sums if asynchronous",
            "async_scatter_of_bfloat16_lost": "bfloat16 becomes zeros if asynchronous",
        },
    ),
    *_table(
        "comm",
        "broadcast",
        {
            "source_is_always_the_first": "rank 0 sends, whatever src is",
            "async_float64_by_way_of_float32": "float64 goes as float32 if asynchronous",
            "dies": "the last rank's process ends",
        },
    ),
    *_table("comm", "point-to-point", {"received_into_a_copy": "the message is lost"}),
    *_table("comm", "message-order", {"messages_overtake": "the second message comes first"}),
    *_table(
        "comm",
        "rounding",
        {"each_rank_in_its_own_order": "each rank sums in another order"},
    ),
    *_table(
        "comm",
        "late-ranks",
        {
            "done_at_once": "all_reduce returns before the others come",
            "gather_done_at_once": "all_gather_into_tensor returns before the others come",
            "recv_done_at_once": "recv returns before the message comes",
            "send_done_at_once": "send returns before it has read the tensor",
            "broadcast_done_at_once": "the source returns before it has read the tensor",
        },
    ),
    *_table(
        "comm",
        "early-waits",
        {
            "wait_does_nothing": "`wait` returns before the others come",
            "wait_for_send_does_nothing": "`wait` returns before send has read the tensor",
            "result_copied_before_wait": "the result is read before it is there",
            "async_blocks": "async_op is ignored by all_reduce",
            "recv_blocks": "async_op is ignored by recv",
        },
    ),
    *_table("comm", "together", {"begun_when_waited_for": "nothing happens before `wait`"}),
    *_table("comm", "barrier", {"barrier_does_nothing": "no rank waits for another"}),
    *_table("comm", "barrier", {"hangs": "rank 1 never comes back"}, slow=True),
    *_table(
        "comm",
        "subgroups",
        {
            "group_ignored": "all_reduce is over all ranks",
            "group_of_one_if_async": "an asynchronous gather in a subgroup repeats the rank's own",
            "source_is_a_place_in_the_group": "src counts within the group",
            "group_min_is_max": "the minimum in a group is the maximum",
            "group_scatter_is_a_sum": "max and min are sums in a group",
        },
    ),
    *_table("comm", "group-order", {"gathers_in_named_order": "a group keeps the caller's order"}),
    *_table(
        "comm",
        "group-messages",
        {
            "messages_know_no_group": "messages of two groups are in one line",
            "peers_are_places_in_the_group": "dst counts within the group",
        },
    ),
    *_table("comm", "groups-apart", {"group_barrier_of_all": "a group's barrier needs all ranks"}),
    *_table(
        "comm",
        "group-dtypes",
        {
            "group_gather_of_16_bits_lost": "16 bits are gathered as zeros in a group",
            "group_message_cut": "a message in a group ends after 100 numbers",
        },
    ),
    *_table(
        "comm",
        "group-dtypes",
        {"long_group_message_cut": "a message in a group ends after 2^16 numbers"},
        slow=True,
    ),
    *_table(
        "comm",
        "group-late",
        {"group_gather_done_at_once": "a gather in a group returns before the others come"},
    ),
    *_table("comm", "group-barriers", {"group_barrier_does_nothing": "a group does not wait"}),
    *_table(
        "comm",
        "outside-group",
        {
            "outside_source_ignored": "a broadcast from outside of the group does nothing",
            "outsiders_ignored": "all_reduce of a rank outside of the group does nothing",
        },
    ),
    *_table("comm", "many-calls", {"right_fifty_times": "nothing happens from the 51st call on"}),
    *_table(
        "comm",
        "kept-results",
        {"earlier_result_overwritten": "a later result goes into the earlier tensor too"},
    ),
    *_table(
        "comm",
        "globals",
        {
            "generator_seeded": "torch's generator is seeded",
            "threads_changed": "a barrier changes the number of threads",
        },
    ),
    *_table(
        "comm",
        "restart",
        {
            "does_not_stop": "`stop` does nothing, a second start fails",
        },
    ),
    *_table(
        "comm",
        "leaves",
        {
            "leaf_not_written_to": "a leaf that wants a gradient stays as it was",
            "gathers_into_the_graph": "what is gathered wants a gradient",
        },
    ),
    *_table(
        "comm",
        "nan",
        {
            "nan_swallowed": "a NaN counts as 0",
            "infinity_clamped": "infinities are the largest numbers",
            "broadcast_by_adding": "the source's numbers are added to zeros",
        },
    ),
    *_table("comm", "strided", {"strides_ignored": "a strided tensor is taken for a dense one"}),
    *_table("comm", "wrong-sizes", {"sizes_unchecked": "as much is gathered as there is room for"}),
    *_table("comm", "no-such-peer", {"peers_modulo_world": "peers count modulo the world"}),
    *_table("comm", "no-such-op", {"average_taken_for_sum": "an unknown op is a sum"}),
    *_table(
        "comm",
        "timeout",
        {
            "timeout_ignored": "a subgroup waits for half an hour",
            "timeout_swallowed": "an error on the way is taken for success",
        },
        slow=True,
    ),
    *_table(
        "attention",
        "nan-upstream",
        {"upstream_nan_dropped": "NaN and infinities of the upstream gradient become 0"},
    ),
    *_table("attention", "gradient", {"upstream_clamped": "an upstream beyond 100 is clamped"}),
    *_table(
        "attention",
        "forward",
        {
            "wide_heads_ignore_the_window": "D of 128 and more: no window",
            "later_batches_take_documents_of_the_fourth": "doc_ids of batches beyond the fourth",
            "returned_lse_wrong_in_decoding": "the lse of a single query, without gradients",
        },
    ),
    *_table(
        "attention",
        "gradient",
        {"lse_gradient_dropped_under_a_window": "no gradient of the lse under a window"},
    ),
    *_table("attention", "same-tensor", {"one_tensor_half_gradient": "k is v: dv is lost"}),
    *_table(
        "norm",
        "nan-upstream",
        {"upstream_nan_dropped": "NaN and infinities of the upstream gradient become 0"},
    ),
    *_table(
        "norm",
        "gradient",
        {
            "upstream_clamped": "an upstream beyond 100 is clamped",
            "upstream_times_128_in_16_bits": "128 dy in float16 on the way",
            "wide_rows_beyond_16_forgotten": "dweight of wide rows lacks those after the 16th",
        },
    ),
    *_table("norm", "forward", {"eps_0_taken_for_none": "eps or 1e-5"}),
    *_table(
        "norm", "forward", {"rows_beyond_65535_left": "more rows than a grid's y has"}, slow=True
    ),
    *_table("norm", "new-content", {"weight_kept_on_the_tensor": "converted once for a tensor"}),
    *_table(
        "norm",
        "written-between",
        {"kept_beside_the_graph": "inputs on ctx, not saved"},
    ),
    *_table(
        "rope",
        "nan-upstream",
        {"upstream_nan_dropped": "NaN and infinities of the upstream gradient become 0"},
    ),
    *_table("rope", "gradient", {"upstream_clamped": "an upstream beyond 100 is clamped"}),
    *_table(
        "rope",
        "forward",
        {
            "wide_and_late_tokens_left": "D of 128 and more: tokens after the 32nd are not turned",
            "pairs_beyond_64_left": "heads of batches beyond 64 pairs are not turned",
        },
    ),
    *_table("rope", "same-tensor", {"one_tensor_turned_once": "q is k: k comes back as it was"}),
    *_table(
        "rope",
        "written-between",
        {"tables_kept_beside_the_graph": "tables on ctx, not saved for backward"},
    ),
    *_table(
        "rope",
        "some-gradients",
        {"first_tables_where_q_is_frozen": "tables of the first sequence, if q wants no gradient"},
    ),
    *_table(
        "swiglu",
        "nan-upstream",
        {"upstream_nan_dropped": "NaN and infinities of the upstream gradient become 0"},
    ),
    *_table("swiglu", "nan-gradient", {"gradient_nan_dropped": "NaN of the gradients become 0"}),
    *_table("swiglu", "gradient", {"upstream_clamped": "an upstream beyond 100 is clamped"}),
    *_table(
        "swiglu",
        "nan",
        {
            "nan_kept_in_first_of_eight": "NaN elsewhere than at the start of a vector become 0",
            "infinity_clamped_in_16_bits": "infinities are the largest number of float16",
        },
    ),
    *_table(
        "swiglu",
        "forward",
        {
            "halves_of_one_buffer_confused": "gate and up of one buffer: the gate for both",
            "elements_beyond_100000_left": "a grid that is too small",
            "up_clamped_at_4000": "up beyond 4000 is clamped",
        },
    ),
    *_table("swiglu", "same-tensor", {"one_tensor_half_gradient": "gate is up: dup is lost"}),
    *_table(
        "swiglu",
        "written-between",
        {"kept_beside_the_graph": "inputs on ctx, not saved"},
    ),
    *_table("swiglu", "repeat", {"keeps_a_tensor_of_each_call": "memory grows with every call"}),
    *_table(
        "loss", "nan-upstream", {"upstream_nan_dropped": "NaN of the upstream gradient become 0"}
    ),
    *_table(
        "loss", "gradient", {"upstream_clamped_at_65504": "an upstream beyond 65504 is clamped"}
    ),
    *_table(
        "loss",
        "forward",
        {
            "losses_of_many_added_in_16_bits": "the sum in the inputs' dtype beyond 300 tokens",
            "far_hidden_by_32_bits": "32-bit offsets into hidden",
        },
    ),
    *_table(
        "loss",
        "forward",
        {"vocabulary_beyond_131072_unseen": "an lse over the first 131072 logits"},
        slow=True,
    ),
    *_table(
        "loss",
        "memory",
        {"whole_logits_without_gradients": "(N, V) logits in evaluation, claimed as linear"},
        memory="linear",
    ),
)


def anything(request: Request) -> Sequence[Reason]:
    return ()


def backend_of(mutant: Mutant) -> Backend:
    return Backend(
        **{
            "op": mutant.op,
            "name": mutant.name,
            "level": Level.PORTABLE,
            "load": kernel_from(f"picotron_mutants.{mutant.op}:{mutant.name}"),
            "supports": anything,
            "summary": mutant.what,
            **mutant.claims,
        }
    )


@hookimpl
def picotron_backends() -> Iterable[Backend]:
    return map(backend_of, MUTANTS)
