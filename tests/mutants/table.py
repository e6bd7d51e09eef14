"""The faults that the tests must find, by the file that they are planted in.

A name says which formula is broken and how, in words that outlive a rewrite: whoever moves a
formula plants its faults again where it now is. `run.py` tries them all; tests/test_mutants.py
checks that every old text is still there.
"""

from __future__ import annotations

from run import Mutant

# --- members of the family, as the names of tests write them --------------------------------------

INFONCE = "infonce(epsilon=1.0,temperature_scaled=False)"
INFONCE_SMALL = "infonce(epsilon=0.3,temperature_scaled=False)"
TRIPLET = "triplet(margin=1.0)"
SOFT_TRIPLET = "soft_triplet(margin=1.0)"
SQUARE = "alpha_square(detach_alpha=False)"
GAMMA = "alpha_gamma(gamma=1.5,detach_alpha=False)"
UNIFORM = "uniform()"
ENTROPY = "alpha_entropy(alpha_eps=0.0,detach_alpha=True)"
ENTROPY_PLUS = "alpha_entropy(alpha_eps=0.2,detach_alpha=True)"
INVERSE = "alpha_inverse(exponent=3.0,order=2.0,normalized=True,alpha_eps=0.0,detach_alpha=False)"
CUSTOM_LOSS = "PairLoss(phi=log1p_and_square,psi=exp_plus_sigmoid)"


def direct(
    exponent: float = 4.0,
    alpha_eps: float = 0.0,
    detach_alpha: bool = True,
    normalized: bool = True,
) -> str:
    weights = f"exponent={exponent},normalized={normalized},alpha_eps={alpha_eps}"
    return f"alpha_direct({weights},detach_alpha={detach_alpha})"


DIRECT, THROUGH = direct(), direct(detach_alpha=False)


def blocked(member: str, setting: str = "two_view-True-cosine") -> str:
    return f"tests/test_backends.py::test_equals_reference[{member}-{setting}]"


def one_sided(member: str, setting: str = "two_view-True-cosine") -> str:
    return f"tests/test_backends.py::test_one_sided_gradient[{member}-{setting}]"


def formula(member: str) -> str:
    return f"tests/test_backends.py::test_derivatives_of_the_formulas[{member}]"


def portable(member: str, rows: int = 7) -> str:
    """On the CPU's portable instruction set, in blocks of 7 (four of them, the last one ragged) or
    48 rows (three)."""
    return f"tests/test_cpu.py::test_every_instruction_set[{member}-{rows}]"


RECTANGLE = "tests/test_cpu.py::test_rectangles_of_unequal_sides"


def half(case: str = "13-6-5") -> str:
    test = "tests/test_cpu.py::test_half_precision_on_every_instruction_set"
    return f"{test}[torch.bfloat16-{case}]"


OTHER = "tests/test_cpu_step.py::test_other_similarities_equal_the_two_sweeps"


def step_bits() -> str:
    test = "tests/test_cpu_step.py::test_same_bits_for_any_workspace_and_threads"
    return f"{test}[{INFONCE}-0.3-torch.float32-two_view]"


def step_sweeps(member: str, reduction: str = "mean") -> str:
    return f"tests/test_cpu_step.py::test_equals_the_two_sweeps[{member}-{reduction}]"


def triton(member: str) -> str:
    return f"tests/test_triton.py::test_forms[7-two_view-True-{member}-False]"


def shared_ring(member: str) -> str:
    return f"tests/test_triton.py::test_programs_share_a_ring[two_view-euclidean-{member}]"


def cuda(member: str, setting: str = "two_view-True") -> str:
    return f"tests/test_cuda.py::test_float64[{setting}-{member}]"


IDS, COMPAT, DISTRIBUTED, SIGLIP = (
    "tests/test_ids.py::",
    "tests/test_compat.py::",
    "tests/test_distributed.py::",
    "tests/test_siglip.py::",
)
AGREE = f"{DISTRIBUTED}test_bad_input_on_one_process_raises_on_every_one"
VERIFY = f"{DISTRIBUTED}test_verify_distributed"
SPLIT = f"{DISTRIBUTED}test_every_objective_and_split"
LEVELS = f"{DISTRIBUTED}test_two_levels"

MUTANTS: list[Mutant] = []


def plant(file: str, *faults: tuple[str, ...], variant: str = "", hangs: bool = False) -> None:
    """(name, old text, new text, test) of some faults in one file."""
    MUTANTS.extend(Mutant(name, file, *texts, variant, hangs) for name, *texts in faults)


# --- from embeddings to the sweeps, and back ------------------------------------------------------

plant(
    "alphacl_fast/backend/forms.py",
    (
        "online softmax: sums so far are not rescaled to the new maximum",
        "sums *= (shift - finite(new)).exp()",
        "sums *= 1",
        blocked(INFONCE, "two_view-True-dot"),
    ),
)

plant(
    "alphacl_fast/call.py",
    (
        "reduction none: the incoming gradient is not halved for the two directions of cross_view",
        "return (grad / 2).repeat(2) if self.two_directions else grad",
        "return grad.repeat(2) if self.two_directions else grad",
        blocked(INFONCE, "cross_view-True-cosine"),
    ),
    (
        "reduction none: symmetric cross_view adds the two directions instead of averaging them",
        "return row_losses.view(2, -1).mean(0) if self.two_directions",
        "return row_losses.view(2, -1).sum(0) if self.two_directions",
        blocked(INFONCE, "cross_view-True-cosine"),
    ),
    (
        "reduction sum: symmetric cross_view counts both directions",
        "return row_losses.sum() / 2 if self.two_directions else row_losses.sum()",
        "return row_losses.sum()",
        blocked(INFONCE, "cross_view-True-cosine"),
    ),
    (
        "divisor of the row weights: 1 instead of 2 for symmetric cross_view summed",
        "return 2 if self.two_directions else 1",
        "return 1",
        blocked(INFONCE, "cross_view-True-cosine"),
    ),
    (
        "two_view: |Neg| counts the positive",
        "return cls(2 * n, 0, n, 2 * n, 2 * n - 2, False)",
        "return cls(2 * n, 0, n, 2 * n, 2 * n - 1, False)",
        blocked(UNIFORM),
    ),
    (
        "cross_view: |Neg| counts the positive",
        "return cls(2 * n, n, n, loss.anchors(n), n - 1, True)",
        "return cls(2 * n, n, n, loss.anchors(n), n, True)",
        blocked(ENTROPY_PLUS, "cross_view-True-cosine"),
    ),
    (
        "ids: |Neg| counts the anchor itself",
        "return len(others) - sizes[anchors]",
        "return len(others) - sizes[anchors] + 1",
        f"{IDS}test_groups[False-40]",
    ),
    (
        "ids: two ids that follow each other are taken for the same",
        "torch.nn.functional.pad(in_order[1:] != in_order[:-1], (1, 0))",
        "torch.nn.functional.pad(in_order[1:] > in_order[:-1] + 1, (1, 0))",
        f"{IDS}test_loss_against_equals_a_loop[{INFONCE}-7]",
    ),
    (
        "ids: the mean over the negatives counts those with the anchor's id",
        "return rows.sum(0) - of_id.index_select(0, self.ids[anchors])",
        "return rows.sum(0)",
        f"{IDS}test_loss_against_equals_a_loop[{UNIFORM}-7]",
    ),
)
plant(
    "alphacl_fast/autograd.py",
    (
        "euclidean rows: the mean is not subtracted",
        "centered = wide - (wide.mean(0) if center is None else center)",
        "centered = wide",
        "tests/test_numerics.py::test_euclidean_far_from_the_origin[blocked]",
    ),
    (
        "euclidean bias: ‖f‖² without the factor −½",
        "return cls(Rows(centered, None, centered.square().sum(1) / -2), None)",
        "return cls(Rows(centered, None, -centered.square().sum(1)), None)",
        blocked(INFONCE, "two_view-True-euclidean"),
    ),
    (
        "euclidean positive similarity without the factor ½",
        "return ((a - b).square().sum(1) / -2 if",
        "return (-(a - b).square().sum(1) if",
        blocked(INFONCE, "two_view-True-euclidean"),
    ),
    (
        "cosine: an all-zero row has inverse norm 1",
        "zero, 0.0, ((1 / norm) / safe)",
        "zero, 1.0, ((1 / norm) / safe)",
        "tests/test_numerics.py::test_zero_row_has_zero_gradient",
    ),
    (
        "normalisation's derivative: the component along the row stays",
        "across = torch.addcmul(d, rows, along, value=-1)",
        "across = torch.addcmul(d, rows, along, value=0)",
        blocked(INFONCE),
    ),
    (
        "ids: a row without negatives keeps its positive term",
        'for name in ("row_weight", "mass", "dtau", *more)',
        'for name in ("row_weight", "dtau", *more)',
        f"{IDS}test_some_anchors_without_negatives[blocked]",
    ),
    (
        "ids: the running max of a row without negatives is not made finite",
        "largest = torch.where(sums[:head] == -torch.inf, 0.0, sums[:head])",
        "largest = sums[:head]",
        f"{IDS}test_anchors_without_negatives[mean-blocked]",
    ),
    (
        "gradient sweep: the moment is taken about t⁺ where the objective says another origin",
        "        if scalars.moment_origin is None:\n            scalars",
        "        if True:\n            scalars",
        blocked(SQUARE),
    ),
    (
        "mean over the negatives: the anchor's own pair is counted",
        "sums = total(left, right) - own(left, right)\n",
        "sums = total(left, right)\n",
        blocked(UNIFORM),
    ),
    (
        "mean over the negatives: the positive pair is counted",
        "sums = sums - own(left, right.roll(layout.partner, 0))",
        "sums = sums - 0",
        blocked(UNIFORM),
    ),
    (
        "reduction none: the positive term does not take the incoming gradient",
        "return self._gradient(weighted(solution, lambda x: x * c), need)[1:]",
        "return self._gradient(replace(solution, row_weight=solution.row_weight * c), need)[1:]",
        blocked(INFONCE),
    ),
    (
        "scalar loss: the incoming gradient is ignored",
        "return in_dtypes([None if x is None else x * grad for x in gradients], dtypes)",
        "return in_dtypes([None if x is None else x for x in gradients], dtypes)",
        "tests/test_loss.py::TestAutograd::test_scaled_gradients_accumulate[infonce]",
    ),
    (
        "∂L/∂τ from pairs: the row weight is left out",
        "(solution.row_weight * sums[-1] if from_pairs",
        "(sums[-1] if from_pairs",
        blocked(THROUGH),
    ),
    (
        "positive term: both anchors of a pair weigh as the first one",
        "(q[:n] + q[n:]).unsqueeze(1)",
        "(2 * q[:n]).unsqueeze(1)",
        blocked(INFONCE, "two_view-True-euclidean"),
    ),
    (
        "positive term dropped from dz2 of dot and cosine",
        "d2.addcmul_(q, f1, value=-1)",
        "d2.addcmul_(q, f1, value=0)",
        blocked(INFONCE),
    ),
    (
        "positive term dropped from dz1 of cross_view, first direction only",
        "d1.addcmul_(q, f2, value=-1)",
        "d1.addcmul_(q, f2, value=0)",
        blocked(TRIPLET, "cross_view-False-dot"),
    ),
    (
        "euclidean positive term: wrong sign in dz2",
        "d2 -= apart",
        "d2 += apart",
        blocked(INFONCE, "one_view-True-euclidean"),
    ),
    (
        "euclidean gradient: the sums of a row's weights times the row are not subtracted",
        "d[used] -= weight_sums[used].unsqueeze(1) * rows[used]",
        "d[used] -= 0 * rows[used]",
        blocked(TRIPLET, "two_view-True-euclidean"),
    ),
    (
        "one-sided gradient: rows that pairs do not reach begin as ones",
        "d = self.tau.new_zeros(2 * n, self.features.rows.f.shape[1])",
        "d = self.tau.new_ones(2 * n, self.features.rows.f.shape[1])",
        blocked(INFONCE, "one_view-True-dot"),
    ),
)
plant(
    "alphacl_fast/explicit_negatives.py",
    (
        "explicit negatives: their gradient begins with the anchors'",
        "dz[own:].to(z.dtype)",
        "dz[0:].to(z.dtype)",
        f"{COMPAT}test_loss_against[{INFONCE}-5]",
    ),
    (
        "explicit negatives: ∂L/∂t⁺ has the wrong sign",
        "-(saved.solution.mass * grad) if need_pos",
        "(saved.solution.mass * grad) if need_pos",
        f"{COMPAT}test_loss_against[{INFONCE}-5]",
    ),
    (
        "explicit negatives: |Neg| among the anchors counts the anchor itself",
        "else Layout(n, 0, 0, n, n - 1, False)",
        "else Layout(n, 0, 0, n, n, False)",
        f"{COMPAT}test_loss_against[{UNIFORM}-None]",
    ),
    (
        "explicit negatives: ids of the anchors and of the negatives in the wrong order",
        "ids = torch.cat([ids, negative_ids])",
        "ids = torch.cat([ids.flip(0), negative_ids])",
        f"{IDS}test_loss_against_equals_a_loop[{TRIPLET}-7]",
    ),
    (
        "explicit negatives: ∂L/∂t⁺ ignores the incoming gradient",
        "-(saved.solution.mass * grad) if need_pos",
        "-saved.solution.mass if need_pos",
        f"{COMPAT}test_loss_against[{INFONCE}-5]",
    ),
)
AGAINST = "tests/test_loss_against.py::"
plant(
    "alphacl_fast/explicit_negatives.py",
    (
        "log-weights: rows that meet one another weigh as anchors too",
        "bias = torch.cat([bias.new_zeros(len(z)), bias])",
        "bias = torch.cat([bias, bias]) if given.z is negatives else "
        "torch.cat([bias.new_zeros(len(z)), bias])",
        f"{AGAINST}test_log_weights[True-infonce0-blocked]",
    ),
    (
        "log-weights: a weight of 0 has a gradient in the temperature",
        "return torch.where(never, _NEVER, bias)",
        "return torch.where(never, -math.inf, bias)",
        f"{AGAINST}test_log_weights_of_minus_infinity[False-blocked]",
    ),
    (
        "log-weights: they are divided by the temperature",
        "bias = objective.kind_tau(tau).to(dtype) * torch.where(never, 0.0, weights)",
        "bias = torch.where(never, 0.0, weights) + 0 * tau.to(dtype)",
        f"{AGAINST}test_log_weights[False-infonce0-blocked]",
    ),
    (
        "temperature per anchor: the objective is not checked once the ranks agree on it",
        "if given.per_anchor:  # perhaps",
        "if False:  # perhaps",
        f"{AGAINST}test_all_ranks_refuse[options4-temperature must have one element with mine]",
    ),
    (
        "temperature per anchor: the one in front of the loss is left out",
        "return call.objective.times_temperature(losses, scale)",
        "return losses",
        f"{AGAINST}test_temperature_per_anchor[False-False-infonce2]",
    ),
)
LEFT_OUT = "tests/test_distributed.py::test_negatives_are_left_out_over_ranks"
plant(
    "alphacl_fast/distributed.py",
    (
        "ids over ranks: |Neg| counts one view of the others",
        "views * (self.total - sizes[own])",
        "(self.total - sizes[own])",
        "tests/test_distributed.py::test_ids_are_compared_over_ranks[(4, 1)-gather]",
    ),
    (
        "ids over ranks: a rank's rows have the first rank's ids",
        "self.ranks.ids_of(rank).repeat(2)[: self.layouts[rank].rows]",
        "self.ranks.ids.repeat(2)[: self.layouts[rank].rows]",
        "tests/test_distributed.py::test_ids_are_compared_over_ranks[(4, 1)-gather]",
    ),
    (
        "gaps over ranks: a visiting block has no limits",
        "Limits(*of_anchors[count:])",
        "Limits()",
        f"{LEFT_OUT}[max_gap-(5, 3)-ring]",
    ),
    (
        "guide over ranks: its opinion on pairs of two ranks is lost",
        "scalars, limits, Marks(ids, guide))",
        "scalars, limits, Marks(ids, None if guide is None else 0 * guide))",
        f"{LEFT_OUT}[guide_margin-(3, 0, 4)-gather]",
    ),
)
SUPCON = "tests/test_supcon.py::"
plant(
    "alphacl_fast/same_id.py",
    (
        "same ids: the anchor is one of its positives",
        "excluded.diagonal(i.start - j.start).fill_(True)",
        "excluded.diagonal(i.start - j.start).fill_(False)",
        f"{SUPCON}test_equals_the_dense_formula[any-out-blocked]",
    ),
    (
        "same ids: the last groups of a batch are forgotten",
        "    if start < begin:\n        yield start, begin\n\n\nclass",
        "\n\nclass",
        f"{SUPCON}test_blocks_cost_what_the_groups_cost",
    ),
)
plant(
    "alphacl_fast/supcon.py",
    (
        "supervised contrastive: the share of a positive is subtracted from 1",
        ".expm1_().mul_(among[:, None]).sub_(others[:, None])",
        ".exp_().mul_(among[:, None]).sub_(1.0)",
        f"{SUPCON}test_exact_once_trained[blocked-2-out]",
    ),
    (
        "supervised contrastive: log|P| is missing from the inner form",
        "loss, others = block.count.log() + _log1p_exp(ratio)",
        "loss, others = _log1p_exp(ratio)",
        f"{SUPCON}test_equals_the_dense_formula[any-in-blocked]",
    ),
    (
        "supervised contrastive: the mean counts rows without a positive",
        "count = weight.sum() if sharing is None",
        "count = weight.new_tensor(len(weight)) if sharing is None",
        f"{SUPCON}test_equals_the_dense_formula[any-sincere-blocked]",
    ),
)
ZOO = "tests/test_zoo.py::"
plant(
    "alphacl_fast/zoo.py",
    (
        "debiased: no floor under the corrected sum",
        "log_ratio = torch.where(usable, corrected, floor)",
        "log_ratio = corrected",
        f"{ZOO}test_of_views_equals_the_formula[blocked-debiased(tau_plus=0.6,temperature=0.2)]",
    ),
    (
        "iSogCLR over ranks: one temperature for the only sample of every rank",
        "one_each=True,",
        "one_each=None,",
        f"{ZOO}test_running_sums_over_processes[ISogCLR-options1-(1, 1, 1)]",
    ),
    (
        "iSogCLR over ranks: only the visitor's own rank keeps its state",
        "return self.sharing.gather(self.index, 0), self.sharing.gather(state, 0)",
        "return self.index, state",
        f"{ZOO}test_running_sums_over_processes[ISogCLR-options1-(3, 1, 4)]",
    ),
    (
        "ADNCE: the gradient runs through the weights",
        "return weight(s.detach()) * torch.exp",
        "return weight(s) * torch.exp",
        f"{ZOO}test_of_views_equals_the_formula[blocked-adnce()]",
    ),
    (
        "circle: one band, whatever γ",
        "count = max(1, math.ceil((most - least) / (2 * _HALF_BAND)))",
        "count = 1",
        f"{ZOO}test_circle_of_extreme_rows_in_float32",
    ),
    (
        "SogCLR: the first visit is mixed with 0",
        "return torch.where(log_u == -math.inf, log_mean, mixed)",
        "return mixed",
        f"{ZOO}test_sogclr_equals_the_recursion",
    ),
)

# --- formulas of the objectives -------------------------------------------------------------------

plant(
    "alphacl_fast/objectives.py",
    (
        "sigmoid loss: log(1 + e) loses the digits of a small e",
        "return torch.relu(x) + torch.log1p(_exp_of_minus_abs(x))",
        "return torch.relu(x) + torch.log(1 + _exp_of_minus_abs(x))",
        f"{SIGLIP}test_float32_is_as_good_as_eager[trained-blocked]",
    ),
    (
        "sigmoid loss: the slope is 1 minus a number close to 1",
        "return torch.where(x > 0, 1.0, e) / (1 + e)",
        "return 1 - torch.where(x > 0, e, 1.0) / (1 + e)",
        f"{SIGLIP}test_float32_is_as_good_as_eager[trained-blocked]",
    ),
    (
        "sigmoid loss: a large logit overflows",
        "return torch.exp(torch.where(x > 0, -x, x))",
        "return torch.exp(x)",
        f"{SIGLIP}test_infinite_logits",
    ),
    (
        "sigmoid loss: the positive's term has the sign of a negative's",
        "total + logistic.f(-y, scale)",
        "total + logistic.f(y, scale)",
        f"{SIGLIP}test_one_pair_is_its_positive_term[sum-blocked]",
    ),
    (
        "sigmoid loss: the bias has the gradient of the negatives alone",
        "moment / used - pull * pos, slope - pull",
        "moment / used - pull * pos, slope",
        f"{SIGLIP}test_equals_the_dense_formula[mean-cosine-blocked]",
    ),
    (
        "sigmoid loss: the gradient in the scale belongs to moments of another origin",
        "return RowSolution(**rows, moment_origin=zero)",
        "return RowSolution(**rows)",
        f"{SIGLIP}test_equals_the_dense_formula[mean-cosine-blocked]",
    ),
    (
        "sigmoid loss: a scale of 0 divides its own derivative",
        "return torch.where(tau[0].abs() < self.LEAST_SCALE, self.LEAST_SCALE, tau[0])",
        "return tau[0]",
        f"{SIGLIP}test_equals_the_dense_formula[mean-cosine-blocked]",
    ),
    (
        "sigmoid loss: the first view's gradient lacks the scale of its rows",
        "df.view(-1, df.shape[-1])[:n].mul_(self._used(tau))",
        "pass",
        f"{SIGLIP}test_equals_the_dense_formula[mean-cosine-blocked]",
    ),
    (
        "sigmoid loss: an anchor whose negatives share its id has loss 0",
        "one_sweep, derivative, needs_negatives, recordable = True, True, False, True",
        "one_sweep, derivative, needs_negatives, recordable = True, True, True, True",
        f"{SIGLIP}test_ids[one-blocked]",
    ),
)
plant(
    "csrc/cpu/vec.h",
    (
        "log(1 + x) without what the sum loses of x",
        "return log_of<T, true>(u, x - (u - 1));",
        "return log_of<T, false>(u, x - (u - 1));",
        "tests/test_cpp_printer.py::test_log1p_keeps_the_digits_of_a_small_argument[torch.float32]",
    ),
    (
        "log(1 + e) of a probability: a coefficient of the polynomial",
        "q = q * x + 1.9695401192e-1f;",
        "q = q * x + 1.9696401192e-1f;",
        "tests/test_cpp_printer.py::test_log1p_of_a_probability_keeps_its_digits[torch.float32]",
    ),
)
plant(
    "alphacl_fast/objectives.py",
    (
        "φ = log(ε + x): ε is ignored",
        "return torch.logaddexp(ell, torch.zeros_like(ell) + _log(self.epsilon))",
        "return ell",
        blocked(INFONCE),
    ),
    (
        "φ′ of log(ε + x): log ε is not subtracted",
        "return torch.sigmoid(ell - _log(self.epsilon))",
        "return torch.sigmoid(ell)",
        blocked(INFONCE_SMALL),
    ),
    (
        "φ = max(log x, 0)²: the derivative without its factor 2",
        "return 2 * torch.relu(ell)",
        "return torch.relu(ell)",
        blocked("lifted_structured(margin=1.0)"),
    ),
    (
        "ψ = exp(Δ/τ + margin): the margin is left out",
        "return (shift - pos / tau) + total.log() + self.margin",
        "return (shift - pos / tau) + total.log()",
        blocked(SOFT_TRIPLET),
    ),
    (
        "∂ℓ/∂τ: wrong sign",
        "weight * gap_sum / -numbers.tau",
        "weight * gap_sum / numbers.tau",
        blocked(INFONCE),
    ),
    (
        "∂(τφ)/∂τ: φ − φ′ℓ is left out",
        "return ((outer.legendre(ell) + outer.dphi(ell) * spread) / numbers.divisor,)",
        "return ((outer.dphi(ell) * spread) / numbers.divisor,)",
        blocked(SOFT_TRIPLET),
    ),
    (
        "∂(τφ)/∂τ: the moment about the maximum is not divided by the sum",
        "spread = outer.margin + total.log() - moment / (total * numbers.tau)",
        "spread = outer.margin + total.log() - moment / numbers.tau",
        blocked(SOFT_TRIPLET),
    ),
    (
        "row weight of exp kinds: 1/τ missing",
        "mass = outer.scaled(outer.dphi(ell), tau) / tau / numbers.divisor",
        "mass = outer.scaled(outer.dphi(ell), tau) / numbers.divisor",
        blocked(INFONCE),
    ),
    (
        "hinge: its derivative's kink is at 0 instead of −margin",
        "return (x + margin > 0).to(x.dtype)",
        "return (x > 0).to(x.dtype)",
        blocked(TRIPLET),
    ),
    (
        "power: the derivative's factor q missing",
        "slope = q * d.clamp(min=torch.finfo(d.dtype).tiny).pow(q - 1)",
        "slope = d.clamp(min=torch.finfo(d.dtype).tiny).pow(q - 1)",
        formula(direct(1.5, 0.1, False)),
    ),
    (
        "power: a negative d² keeps its power",
        "return torch.relu(d).square()",
        "return d.square()",
        f"tests/test_reference.py::test_definitions[dot-two_view-True-{DIRECT}]",
    ),
    (
        "power: ∂ log f/∂τ has the wrong sign",
        "return _power(c - t, q) / tau.square()",
        "return _power(c - t, q) / -tau.square()",
        blocked(THROUGH),
    ),
    (
        "inverse: the derivative's factor k missing",
        "return _power_slope(c - t, q) / (_power(c - t, q) + tau) * k",
        "return _power_slope(c - t, q) / (_power(c - t, q) + tau)",
        blocked(INVERSE),
    ),
    (
        "square: ∂h/∂τ has the wrong sign",
        "return torch.relu(x) / -tau.square()",
        "return torch.relu(x) / tau.square()",
        blocked(SQUARE),
    ),
    (
        "gamma: the derivative's factor 1/γ missing",
        "return _gamma_root(tau / -x, gamma) / (-gamma * x)",
        "return _gamma_root(tau / -x, gamma) / -x",
        formula(GAMMA),
    ),
    (
        "φ/ψ: φ′ is missing in the row weight",
        "weight = dphi / numbers.divisor",
        "weight = 1 / numbers.divisor + 0 * dphi",
        blocked(CUSTOM_LOSS),
    ),
    (
        "normalised weights: alpha_eps·|Neg| is not made relative to the row's shift",
        "z = total + (extra * (-shift[0]).exp() if shift else extra)",
        "z = total + extra",
        blocked(ENTROPY_PLUS),
    ),
    (
        "normalised weights through α: no baseline",
        "return weight, mass, loss, loss",
        "return weight, mass, loss, torch.zeros_like(loss)",
        blocked(THROUGH),
    ),
    (
        "normalised weights: a row whose weights are all 0 is divided by 0",
        "usable = x >= torch.finfo(x.dtype).tiny\n",
        "usable = x >= 0\n",
        "tests/test_rows.py::test_row_step[5-torch.float64-weight_rows]",
    ),
    (
        "unnormalised weights: the positive term is not divided by the divisor",
        "return total / numbers.divisor, gap_sum",
        "return total, gap_sum",
        blocked(direct(normalized=False), "two_view-True-dot"),
    ),
    (
        "Newton: the bracket keeps the wrong half",
        "low, high = torch.where(below, y, low), torch.where(below, high, y)",
        "low, high = torch.where(below, low, y), torch.where(below, y, high)",
        blocked(SQUARE),
    ),
    (
        "Newton: the bracket begins above the root of a flat row",
        "for a in (1 / p.most_neg, 1.0))",
        "for a in (2 / p.most_neg, 1.0))",
        "tests/test_numerics.py::test_min_player_of_equal_similarities[alpha_square-blocked]",
    ),
    (
        "Newton: it stops at Σh = 1 ± 1e-3",
        "done = ((mass - 1).abs() <= 8 * eps)",
        "done = ((mass - 1).abs() <= 1e-3)",
        blocked(GAMMA),
    ),
    (
        "min player: the loss keeps the moment about the maximum, not about t⁺",
        "loss = moment + mass * (t_max - pos)",
        "loss = moment",
        blocked(SQUARE),
    ),
    (
        "min player through α: the baseline is not divided by Σh′",
        "slope_moment * _safe_inverse(slope)",
        "slope_moment",
        blocked(SQUARE),
    ),
    (
        "constant α: per-negative weights are averaged",
        "return n_neg if self.per_negative else 1.0",
        "return 1.0",
        blocked("triplet_contrastive()"),
    ),
)

# --- the two sweeps as a loop over tiles ----------------------------------------------------------

plant(
    "alphacl_fast/backend/blocked.py",
    (
        "exclusion: the positive counts where it lies below the diagonal",
        "([partner, -partner] if partner else [])",
        "([partner] if partner else [])",
        "tests/test_numerics.py::test_converged_regime[0.1-blocked]",
    ),
    (
        "exclusion: the anchor itself counts",
        "offsets = ([] if split else [0]) + (",
        "offsets = ([] if split else []) + (",
        blocked(INFONCE),
    ),
    (
        "exclusion by ids: a pair with one id counts",
        "return x if self.same_id is None else x.masked_fill_(self.same_id, value)",
        "return x",
        f"{IDS}test_equals_reference[{INFONCE}-two_view-True-cosine]",
    ),
    (
        "row sums: the columns of off-diagonal tiles lose theirs",
        "if pairing.anchors > pairing.split if pairing.split else j0 > i0:",
        "if pairing.anchors > pairing.split if pairing.split else False:",
        blocked(INFONCE),
    ),
    (
        "row sums: the second tower's anchors of a rectangle lose theirs",
        "if pairing.anchors > pairing.split if pairing.split else j0 > i0:",
        "if False if pairing.split else j0 > i0:",
        blocked(INFONCE, "cross_view-True-cosine"),
    ),
    (
        "online softmax: partial sums of workers are added without a common shift",
        "        forms.rescale(other_shift, other_sums, new)\n",
        "",
        "tests/test_backends.py::test_workers_share_the_tiles[False-10]",
    ),
    (
        "row maxima: partial maxima of workers are added",
        "out = torch.maximum(out, other) if form == Form.T_MAX else out.add_(other)",
        "out = out.add_(other)",
        "tests/test_backends.py::test_workers_share_the_tiles[False-3]",
    ),
    (
        "constant shift: the row weight is not rescaled by exp(shift)",
        "row_weight=scalars.row_weight * (shift - scalars.shift).exp()",
        "row_weight=scalars.row_weight * 1",
        blocked(direct(normalized=False)),
    ),
    (
        "constant shift: the constant is not subtracted",
        "return (log_f.sub_(shift) if shift else log_f).exp_()",
        "return log_f.exp_()",
        blocked(ENTROPY_PLUS),
    ),
    (
        "gradient: a diagonal tile's g_ji is forgotten",
        "g = g + g.t()",
        "g = g + 0",
        blocked(INFONCE),
    ),
    (
        "gradient: the columns' anchors do not weigh",
        "for side in sides[1:]:",
        "for side in sides[2:]:",
        blocked(TRIPLET),
    ),
    (
        "gradient: an off-diagonal tile adds to its rows only",
        "_add_product(df, g.t(), sweep.rows[i0:i1], j0, j1, low, high)",
        "_add_product(df, g.t(), sweep.rows[i0:i1], j0, j0, low, high)",
        blocked(INFONCE),
    ),
    (
        "gradient of some rows: weights of the tile's first rows instead of those in the range",
        "df[a - low : b - low].addmm_(g[a - r0 : b - r0], rows)",
        "df[a - low : b - low].addmm_(g[: b - a], rows)",
        one_sided(INFONCE),
    ),
    (
        "gradient through α: the baseline is ignored",
        'return (values["f"] + values["df"] * tile.deviation(side)) * side.scalars.row_weight',
        'return (values["f"] + values["df"] * tile.moment(side)) * side.scalars.row_weight',
        blocked(THROUGH),
    ),
    (
        "∂L/∂τ from pairs: the baseline is ignored",
        "value = value * tile.deviation(side)",
        "value = value * tile.moment(side)",
        blocked(THROUGH),
    ),
    (
        "moments: Σ f′·(t − origin) sums f",
        'Term.DF_MOMENT: "df"',
        'Term.DF_MOMENT: "f"',
        blocked(SQUARE),
    ),
    (
        "euclidean weight sums: the columns of off-diagonal tiles lose theirs",
        "weight_sums[j0:j1] += g.sum(0)",
        "weight_sums[j0:j1] += 0",
        blocked(INFONCE, "two_view-True-euclidean"),
    ),
)

# --- a batch over processes -----------------------------------------------------------------------

plant(
    "alphacl_fast/distributed.py",
    (
        "meetings: blocks half a ring apart are met whole by one process and half by the other",
        "return [(slice(0, n), slice(0, m // 2), True)]",
        "return [(slice(0, n), slice(0, m), True)]",
        f"{DISTRIBUTED}test_the_shared_rectangle_is_cut_in_two",
    ),
    (
        "meetings: cross_view's rectangles half a ring apart are computed by both processes",
        "return [first] if shared else [first, ",
        "return [first, ",
        f"{DISTRIBUTED}test_no_pair_is_computed_twice[cross_view-True-ring]",
    ),
    (
        "agreement: temperatures are not compared",
        "if abs(here - there) > 1e-6 * abs(here):",
        "if abs(here - there) > 1e6 * abs(here):",
        AGREE,
    ),
    ("agreement: similarities are not compared", "similarity={call.similarity!r}, ", "", AGREE),
    (
        "agreement: a gradient that one process alone wants is not asked for",
        "want = Need(*map(any, zip(",
        "want = Need(*map(all, zip(",
        f"{DISTRIBUTED}test_one_process_alone_may_want_a_gradient",
    ),
    (
        "online softmax over processes: arriving sums are not rescaled",
        "into[1:] += sums[1:] * (sums[0] - forms.finite(shift)).exp()",
        "into[1:] += sums[1:]",
        f"{SPLIT}[5-3-ring]",
    ),
    (
        "online softmax over processes: sums so far are not rescaled",
        "            forms.rescale(into[0], into[1:], shift)\n",
        "            into[0] = shift\n",
        f"{SPLIT}[5-3-ring]",
    ),
    (
        "mean over processes: two_view's anchors are counted once",
        "ranks.all_reduce(row_losses.sum()) / loss.divisor(ranks.total)",
        "ranks.all_reduce(row_losses.sum()) / ranks.total",
        f"{VERIFY}",
    ),
    (
        "gradient of a shared loss: not multiplied by the number of processes",
        "None if dz is None else dz.mul_(self.call.ranks.world)",
        "dz",
        f"{VERIFY}",
    ),
    (
        "∂L/∂τ over processes: summed instead of averaged with reduction none",
        'return total / ranks.world if self.call.reduction == "none" else total',
        "return total",
        f"{SPLIT}[5-3-ring]",
    ),
    (
        "exclusion: the positive counts in the process's own block",
        "own, layout.split, layout.partner, [(",
        "own, layout.split, 0, [(",
        f"{VERIFY}",
    ),
    (
        "euclidean: each process subtracts its own mean",
        "return call.ranks.all_reduce(own) / (2 * call.ranks.total)",
        "return own / (2 * len(z1))",
        f"{SPLIT}[5-3-ring]",
    ),
    (
        "constant α over processes: the gradient that others send back through the sum is dropped",
        "return [a + b for a, b in zip(direct[:2], through_sums, strict=True)]",
        "return list(direct[:2])",
        f"{VERIFY}",
    ),
    (
        "ring: results of a block's earlier visits are dropped",
        "theirs.add(Result(sweep, self.layouts[other], behind.wait()))",
        "behind.wait()",
        f"{SPLIT}[3-1-4-2-ring]",
    ),
    (
        "two levels: blocks of nodes that are half a ring apart are met by both",
        "found = meetings(here, there, nodes, ",
        "found = meetings(here, there, nodes + 1, ",
        f"{LEVELS}[2x2]",
    ),
    (
        "two levels: what the own block collects in other nodes is dropped",
        "            mine.add(home)\n        blocks.clear()",
        "            pass\n        blocks.clear()",
        f"{LEVELS}[3x2]",
    ),
    (
        "two levels: the sides of a visitor's rectangles are not exchanged",
        "return [(guest, host, not left) for host, guest, left in found]",
        "return [(guest, host, left) for host, guest, left in found]",
        f"{LEVELS}[3x2]",
    ),
    (
        "gathered messages: a node without pairs sends an empty one",
        "torch.zeros(aligned(largest), ",
        "torch.zeros(-(-largest // 16) * 16, ",
        "tests/test_distributed.py::test_a_node_without_pairs[2x2]",
    ),
)
plant(
    "alphacl_fast/plan.py",
    (
        "meetings: the farthest block of an odd ring is not met",
        "return range(1, world // 2 + 1)",
        "return range(1, (world + 1) // 2)",
        f"{SPLIT}[5-3-ring]",
    ),
)
plant(
    "alphacl_fast/process_groups.py",
    (
        "agreement: the values of users' functions are not compared",
        "_require_same_functions(statements[0], other, r)",
        "pass",
        "tests/test_process_groups.py::test_functions_are_compared_by_value[psi]",
    ),
    (
        "agreement: device types are not compared",
        'require_same("device type", statements[0].device, other.device, r)',
        "pass",
        "tests/test_process_groups.py::test_devices_are_compared",
    ),
    (
        "reduce-scatter by messages: this rank's own part is counted twice",
        "for step in range(1, self.world):",
        "for step in range(self.world):",
        f"{SPLIT}[5-3-gather]",
    ),
)
plant(
    "alphacl_fast/verify.py",
    (
        "verification: differences of small tensors count as absolute",
        "return difference / norm if norm > 0",
        "return difference / max(norm, 1.0) if norm > 0",
        f"{DISTRIBUTED}test_relative_difference",
    ),
)
plant(
    "alphacl_fast/distributed.py",
    ("agreement: strategies are not compared", ", strategy={group.strategy!r}", "", AGREE),
    hangs=True,  # the process with the other strategy waits for messages that nobody sends
)

# --- the CPU kernels ------------------------------------------------------------------------------

plant(
    "csrc/cpu/plan.h",
    (
        "plan: every block's gradient is accumulated apart, in a second matrix",
        "return whole && kernels.in_place(sweep.dim, stride)",
        "return false && whole && kernels.in_place(sweep.dim, stride)",
        "tests/test_cpu.py::test_work_space_at_a_large_batch[16384-128-4]",
    ),
)
plant(
    "csrc/cpu/step.h",
    (
        "step: a kept tile is read before a sweep has filled it",
        "kept_.tile(number, sweep > 0)",
        "kept_.tile(number, true)",
        step_bits(),
    ),
    (
        "step: the second anchor of a positive pair is forgotten",
        "if (call_.anchors > call_.n_pairs) q[i] +=",
        "if (call_.anchors < 0) q[i] +=",
        step_sweeps(INFONCE),
    ),
    (
        "step: padding between blocks is overlooked where a row is looked up",
        "within / plan_.block_rows) * plan_.stride",
        "within / plan_.block_rows) * plan_.block_rows",
        "tests/test_backends.py::test_equals_reference[" + INFONCE + "-two_view-True-cosine]",
    ),
    (
        "step: the mean is a sum",
        "T(total(StepPlan::LOSS) / call_.divisor);",
        "T(total(StepPlan::LOSS));",
        step_sweeps(INFONCE),
    ),
    (
        "step: incoming gradients of anchors do not reach the weights of their pairs",
        "to[r] = incoming ? from[r] * incoming[r] : from[r];",
        "to[r] = from[r];",
        step_sweeps(INFONCE, "none"),
    ),
    (
        "step: sums of the sweep before are added to",
        "std::memset(sums() + term * plan_.padded + x.at, 0, ",
        "std::memset(sums() + term * plan_.padded + x.at, 0, 0 * ",
        "tests/test_cpu_step.py::test_need_flags",
    ),
    (
        "step: the first view's gradient lacks the factor of its rows",
        "df_scale_ * factor, me.mine);",
        "df_scale_, me.mine);",
        f"{SIGLIP}test_equals_the_dense_formula[mean-cosine-cpu]",
    ),
    (
        "step: the bias has the gradient in the scale",
        "place(call_.dtau_of[k]) + x.at, incoming);",
        "place(call_.dtau_of[0]) + x.at, incoming);",
        f"{SIGLIP}test_equals_the_dense_formula[mean-cosine-cpu]",
    ),
    (
        "step: a block without anchors has what an earlier call left as its loss",
        "block_sum(which)[b] = 0;",
        "(void)which;",
        "tests/test_cpu_step.py::test_nothing_of_an_earlier_call_is_left[mean]",
    ),
    (
        "step: the rows that anchors with given positives meet are the anchors",
        "rows.f = second ? call_.z2 : call_.z1,",
        "rows.f = call_.z1,",
        "tests/test_cpu_given.py::test_equals_the_two_sweeps[infonce-37]",
    ),
    (
        "step: the gradient in given positives has the wrong sign",
        "[x.first + r] = -mass[r];",
        "[x.first + r] = mass[r];",
        "tests/test_cpu_given.py::test_equals_the_two_sweeps[infonce-37]",
    ),
    (
        "step: a repeated sweep adds to the sums of the round before",
        "if (sweep >= 0 && call_.program[sweep].most) prepare(sweep, x);",
        "",
        "tests/test_cpu_step.py::test_one_sum_of_a_repeated_sweep_is_not_added_to_the_last_one",
    ),
    (
        "step: a repeated sweep ends after its first round",
        "if (round >= begin.most || me.all_done()) break;",
        "break;",
        "tests/test_cpu_step.py::test_min_players[alpha_square-setting0]",
    ),
)
plant(
    "alphacl_fast/native.py",
    (
        "step: the gradient of the first view is computed where nobody wants it",
        "wanted = (0 if need.z1 else n, 2 * n if need.z2 else n)",
        "wanted = (0, 2 * n if need.z2 else n)",
        "tests/test_cpu_step.py::test_need_flags",
    ),
)
plant(
    "alphacl_fast/eager.py",
    (
        "eager: a plan of another temperature serves a call",
        "if value != prepared.plan.temperature:",
        "if value == prepared.plan.temperature:",
        "tests/test_cpu_step.py::test_prepared_once_and_checked_again",
    ),
    (
        "eager: a plan for promoted rows reads the rows as given",
        "or z1.dtype is not z2.dtype",
        "or False",
        "tests/test_cpu_step.py::test_prepared_once_and_checked_again",
    ),
    (
        "eager: a backward overwrites what a kept graph reads again",
        "not _graph_is_kept()",
        "True",
        "tests/test_cpu_step.py::test_a_kept_graph_is_differentiated_again[torch.float32]",
    ),
    (
        "eager: a backward overwrites what hooks have kept",
        "if not ctx.hooked and _read_once(grad)",
        "if _read_once(grad)",
        "tests/test_cpu_step.py::test_what_hooks_have_packed_is_not_overwritten",
    ),
    (
        "eager: a plan for a float temperature serves an integer",
        "facts.append(_facts(x))",
        "facts.append(Tensor)",
        "tests/test_cpu_step.py::test_the_same_call_of_the_function_is_prepared_once",
    ),
)
plant(
    "alphacl_fast/program.py",
    (
        "program: the gradient's moments are taken of 0",
        'scalars["moment_origin"] = p.pos',
        'scalars["moment_origin"] = ZEROS',
        step_sweeps(THROUGH),
    ),
)
USERS = "tests/test_cpu_functions.py::"
READS = "tests/test_reads.py::"


def as_built_in(member: str) -> str:
    return f"{USERS}test_equals_the_built_in_loss_and_the_reference[{member}]"


plant(
    "alphacl_fast/objectives.py",
    (
        "users' functions: the numbers are those of the first call",
        "if before != values:",
        "if before is None:",
        f"{USERS}test_an_attribute_is_read_in_every_call",
    ),
    (
        "users' min players: the ends of the bracket are those of the first call",
        "if self._inverses[0] != values:",
        "if not self._inverses[0]:",
        f"{READS}test_a_change_moves_the_bracket_of_a_min_player[True]",
    ),
)
plant(
    "alphacl_fast/reads.py",
    (
        "users' functions: −0 in a closure passes for 0",
        "if cell.cell_contents is not value:",
        "if cell.cell_contents != value:",
        f"{READS}test_a_change_is_seen[of_zeros_sign]",
    ),
    (
        "users' functions: other code is not seen",
        "function.__code__ is not code",
        "function.__code__ is None",
        f"{READS}test_a_change_is_seen[of_its_code]",
    ),
    (
        "users' functions: what the functions that they call read is not looked at",
        "or _add_function(reading, value, depth + 1)",
        "or type(value) is types.FunctionType",
        f"{READS}test_a_change_is_seen[of_a_function_that_it_calls]",
    ),
)
plant(
    "alphacl_fast/backend/cpu_step.py",
    (
        "users' min players: a plan keeps the bracket of its first call",
        "step.program[k].params[at] = placed.numbers[name]",
        "pass",
        f"{READS}test_a_change_moves_the_bracket_of_a_min_player[True]",
    ),
)
plant(
    "alphacl_fast/backend/cpu_functions.py",
    (
        "users' functions: a damaged library is loaded",
        'if file.stem.endswith(f"-{_digest(file)}"):',
        "if file.exists():",
        f"{USERS}test_a_damaged_library_is_compiled_again",
    ),
    (
        "users' functions: code is loaded from where other users can write",
        "about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)",
        "about.st_mode & 0",
        f"{USERS}test_without_a_usable_folder[open to all]",
    ),
    (
        "users' functions: a compiler that fails is called again",
        "found = str(error)",
        "raise",
        f"{USERS}test_a_compiler_that_fails",
    ),
    (
        "users' functions: threads compile one after the other",
        "with _lock:\n            found = _libraries.get(key)\n",
        "with _lock:\n",
        f"{USERS}test_threads_compile_once",
    ),
)
plant(
    "alphacl_fast/cpp_printer.py",
    (
        "users' functions: a number is written into the code",
        "scalar = node.op in _ARITHMETIC or",
        'name = f"({a!r} + 0 * {name})"\n        scalar = node.op in _ARITHMETIC or',
        f"{USERS}test_a_constant_compiles_nothing",
    ),
)
plant(
    "alphacl_fast/program.py",
    (
        "a native step confuses φ and φ′",
        "return outputs\n\n    def newton(",
        "return outputs[::-1]\n\n    def newton(",
        as_built_in("infonce"),
    ),
)
plant(
    "csrc/cpu/tile.h",
    (
        "users' functions: the columns' anchors have the rows' shift",
        "x[COL][r] = (of_pair - load(p.col.shift + c)) +",
        "x[COL][r] = (of_pair - p.row.shift[r]) +",
        as_built_in("triplet"),
    ),
    (
        "users' functions: an excluded pair has a weight",
        "if (p.need_df) df[side][r] = keep[side][r] ? df[side][r] : Vec<T>{};",
        "",
        as_built_in("triplet"),
    ),
    (
        "users' functions: the columns' moments are about the rows' origins",
        "y[COL][r] * (t[r] - origin) : y[COL][r];",
        "y[COL][r] * (t[r] - p.row.moment_origin[r]) : y[COL][r];",
        as_built_in("alpha_direct"),
    ),
    variant="portable",
)
plant(
    "csrc/cpu/kernels.cpp",
    (
        "kept similarities are read with the stride of a tile in work",
        "p.t_stride = read_kept ? p.kept_stride : LD;",
        "p.t_stride = LD;",
        as_built_in("infonce"),
    ),
    variant="portable",
)
plant(
    "csrc/cpu/schedule.h",
    (
        "schedule: a diagonal tile reports its block's round twice",
        "if (tile.j != tile.i) progress.finish(tile.j, tile.round + 1);",
        "progress.finish(tile.j, tile.round + 1);",
        "tests/test_cpu.py::test_the_driver_piece_by_piece",
    ),
    (
        "schedule: a rectangle's rounds step by two, so that some pairs of blocks never meet",
        "const int64_t j = (k + round) % m;",
        "const int64_t j = (k + 2 * round) % m;",
        portable(INFONCE),
    ),
    (
        "schedule: a rectangle's rounds go by its left side alone",
        ": left_ > right_ ? left_ : right_;",
        ": left_;",
        "tests/test_cpu.py::test_rectangles_of_unequal_sides[cpu-20]",
    ),
)
plant(
    "csrc/cpu/plan.h",
    (
        "one-sided gradient: a block that straddles the first wanted row is left out",
        "x.first < s.hi && x.first + x.rows > s.lo;",
        "x.first < s.hi && x.first >= s.lo;",
        "tests/test_cpu.py::test_gradients_of_whole_blocks[portable-dtype1-16-two_view-wanted2]",
    ),
)
plant(
    "csrc/cpu/prepare.h",
    (
        "constant shift: the row weight is rescaled without the constant",
        "row_weight[r] *= std::exp(T(s.constant_shift) - shift[r]);",
        "row_weight[r] *= std::exp(-shift[r]);",
        f"{RECTANGLE}[cpu-20]",
    ),
    (
        "ids: every block has the ids of the first",
        "to[b.at + r] = from[b.first + r];",
        "to[b.at + r] = from[(from == (const void*)s.ids ? 0 : b.first) + r];",
        "tests/test_cpu_step.py::test_sigmoid_loss[torch.float32-mean]",
    ),
    (
        "bfloat16 gradient: the largest row weight, divided out, is not multiplied back",
        "v.df_scale = largest;",
        "v.df_scale = 1;",
        half(),
    ),
)
plant(
    "csrc/cpu/collect.h",
    (
        "collecting row sums: padded rows are not skipped",
        "T(from[b.at + r] * scale)",
        "T(from[b.first + r] * scale)",
        f"{RECTANGLE}[cpu-20]",
    ),
    (
        "online softmax: the moment is the sum",
        "gather(v.sums + term * v.padded, out, s.anchors);",
        "gather(v.sums + (s.form == Form::ONLINE ? F : term) * v.padded, out, s.anchors);",
        f"tests/test_cpu_step.py::test_running_maxima_equal_the_two_sweeps[{INFONCE}]",
    ),
    (
        "log-weights of bfloat16 rows: their gradient is divided by the largest row weight",
        "s.n, v.df_scale);",
        "s.n);",
        "tests/test_cpu_given.py::test_other_dtypes_equal_the_two_sweeps[torch.bfloat16-37]",
    ),
)
plant(
    "csrc/cpu/ids.h",
    (
        "ids: an anchor without negatives has some",
        "empty[i] = count == 0;",
        "empty[i] = false;",
        f"{IDS}test_anchors_without_negatives[none-cpu]",
    ),
)
plant(
    "csrc/cpu/tile.h",
    (
        "last partial vector of columns: one column too many counts",
        "Mask<T> keep = lanes < I(p.cols - c);",
        "Mask<T> keep = lanes < I(p.cols - c + 1);",
        portable(INFONCE),
    ),
    (
        "last partial panel of rows: one row too many counts",
        "if (r >= p.rows) keep = Mask<T>{};",
        "if (r > p.rows) keep = Mask<T>{};",
        portable(INFONCE),
    ),
    (
        "exclusion: a diagonal that begins in an earlier vector of columns is not masked",
        "special |= p.diagonals[d] < c + L && p.diagonals[d] + PANEL_ROWS > c;",
        "special |= p.diagonals[d] < c + L && p.diagonals[d] >= c;",
        portable(INFONCE, 48),
    ),
    (
        "constant shift: the columns lose their sums",
        "    col_f += of_c;\n",
        "",
        portable(DIRECT),
    ),
    (
        "constant shift: the columns' moment is about the row's origin",
        "col_ft += of_c * (t - col_origin);",
        "col_ft += of_c * (t - p.row.moment_origin[r]);",
        portable(DIRECT),
    ),
    (
        "online softmax: the columns' terms are relative to the row's maximum",
        "e = vexp<T>(log_f - load(p.col.online_shift + c));",
        "e = vexp<T>(log_f - p.row.online_shift[r]);",
        portable(INFONCE),
    ),
    (
        "row maxima: the columns lose theirs",
        "    col_best = largest<T>(of_c, col_best);\n",
        "",
        portable(SQUARE),
    ),
    (
        "gradient through α: the baseline is ignored",
        "return y.f + y.df * (u - baseline);",
        "return y.f + y.df * u;",
        portable(THROUGH),
    ),
    (
        "∂L/∂τ from pairs: the baseline is ignored",
        "default: return y.dtau * (u - baseline);",
        "default: return y.dtau * u;",
        portable(THROUGH),
    ),
    (
        "constant shift: the columns' anchors do not weigh in the gradient",
        "- p.numbers.middle) * (of_c + of_r);",
        "- p.numbers.middle) * (of_r + 0 * of_c);",
        step_bits(),
    ),
    (
        "kept tiles: the columns' anchors do not weigh in the gradient",
        "Vec<T> g = e * (of_c + of_r);",
        "Vec<T> g = e * (of_r + 0 * of_c);",
        step_bits(),
    ),
    (
        "linear kinds: the offset is not added to the argument",
        "const Vec<T> x = (t - shift) + offset;",
        "const Vec<T> x = t - shift;",
        portable(SQUARE),
    ),
    (
        "ids: the last row of a panel is not looked at",
        "for (int r = 0; r < PANEL_ROWS; r++) equal |= ids == rows[r];",
        "for (int r = 0; r < PANEL_ROWS - 1; r++) equal |= ids == rows[r];",
        f"{IDS}test_many_tiles[member2-two_view-cosine]",
    ),
    variant="portable",
)
plant(
    "csrc/cpu/kernels.cpp",
    (
        "online softmax: the moment so far is not rescaled to the new maximum",
        "      moments[r] *= factor;\n",
        "",
        portable(INFONCE),
    ),
    (
        "sums of a diagonal tile are added for its rows and again for its columns",
        "p.col_terms = p.two_sided && !diagonal;",
        "p.col_terms = p.two_sided;",
        portable(TRIPLET),
    ),
    (
        "exclusion: the positive counts where it lies below the diagonal",
        "if (s.partner) exclude(s.partner), exclude(-s.partner);",
        "if (s.partner) exclude(s.partner);",
        "tests/test_cpu.py::test_any_number_of_features[portable-dtype1-16]",
    ),
    (
        "exclusion: the anchor itself counts",
        "if (!s.split) exclude(0);",
        "if (s.split) exclude(0);",
        portable(INFONCE),
    ),
    (
        "euclidean: rows beyond the first panel have its biases",
        "t += load(bias + j.at + c) + bias[i.at + r0 + r];",
        "t += load(bias + j.at + c) + bias[i.at + r];",
        portable(INFONCE, 48),
    ),
    (
        "euclidean weight sums: the columns lose theirs",
        "    v.weight_sums[j.at + c] += sum;\n",
        "",
        portable(INFONCE),
    ),
    (
        "row maxima: a tile's maxima replace those so far",
        "if (found[r] > best[at + r] || found[r] != found[r]) best[at + r] = found[r];",
        "best[at + r] = found[r];",
        portable(SQUARE),
    ),
    variant="portable",
)
plant(
    "csrc/cpu/native.h",
    (
        "similarities of long rows: the last partial chain of features is left out",
        "for (int64_t k = CHAIN; k < dim; k += CHAIN)",
        "for (int64_t k = CHAIN; k + CHAIN <= dim; k += CHAIN)",
        "tests/test_cpu.py::test_any_number_of_features[portable-dtype1-1000]",
    ),
    (
        "gradient: the other side's product takes W instead of its transpose",
        "if (j.wanted && !diagonal) add_product<1, LD>(s, tile, j.rows, i, j);",
        "if (j.wanted && !diagonal) add_product<LD, 1>(s, tile, j.rows, i, j);",
        portable(TRIPLET),
    ),
    (
        "gradient: a diagonal tile's product is added twice",
        "if (j.wanted && !diagonal) add_product<1, LD>(s, tile, j.rows, i, j);",
        "if (j.wanted) add_product<1, LD>(s, tile, j.rows, i, j);",
        portable(TRIPLET),
    ),
    variant="portable",
)
plant(
    "csrc/cpu/rows.h",
    (
        "step: a distance pushes its own row nowhere",
        " - weight * mine[k];",
        " - 0 * weight * mine[k];",
        f"{OTHER}[{INFONCE}-euclidean-torch.float64]",
    ),
    (
        "step: the similarity of a positive pair is half of its distance's square",
        "*pos = dot(rows[1], rows[1], p.dim) / -2;",
        "*pos = dot(rows[1], rows[1], p.dim) / 2;",
        f"{OTHER}[{INFONCE}-euclidean-torch.float64]",
    ),
)
plant(
    "csrc/cpu/rows.h",
    (
        "positive term: a row is pulled to itself instead of its partner",
        "*partner = rows[1 - view];",
        "*partner = rows[view];",
        portable(INFONCE),
    ),
    (
        "normalisation's derivative: the component along the row stays",
        "d[k] = (d[k] - mine[k] * along) * inverse;",
        "d[k] = d[k] * inverse;",
        portable(INFONCE),
    ),
    (
        "cosine: an all-zero row has inverse norm 1",
        "if (largest == 0) return 0;",
        "if (largest == 0) return 1;",
        "tests/test_numerics.py::test_zero_row_has_zero_gradient",
    ),
    (
        "cosine: the last features of a row, short of a vector, are left out of its norm",
        "for (; k < dim; k++) rest += a[k] * b[k];",
        "for (; k + L < dim; k++) rest += a[k] * b[k];",
        portable(INFONCE),
    ),
    variant="portable",
)
plant(
    "csrc/generated/cpu_pairs.h",
    (
        "power: the derivative's factor q missing",
        "(q * vpow(at_least<T>(x, SMALLEST_NORMAL<T>), double(q) - 1))",
        "vpow(at_least<T>(x, SMALLEST_NORMAL<T>), double(q) - 1)",
        portable(direct(1.5, 0.1, False)),
    ),
    (
        "hinge: its derivative's kink is at 0 instead of −margin",
        "one_where<T>((x + margin) > Vec<T>{})",
        "one_where<T>(x > Vec<T>{})",
        portable(TRIPLET),
    ),
    (
        "inverse: the derivative's factor k missing",
        "+ n.tau)) * k;",
        "+ n.tau));",
        portable(INVERSE),
    ),
    (
        "exp: ∂ log f/∂τ of the pair has the wrong sign in Gibbs weights",
        "return (c - x) * (n.inv_tau * n.inv_tau);",
        "return (x - c) * (n.inv_tau * n.inv_tau);",
        portable("alpha_entropy(alpha_eps=0.0,detach_alpha=False)"),
    ),
    variant="portable",
)
plant(
    "csrc/cpu/dot.h",
    (
        "bfloat16 gradient: the last row of an odd number of rows is left out",
        "const int64_t steps = (other.rows + 1) / 2;",
        "const int64_t steps = other.rows / 2;",
        half(),
    ),
    (
        "bfloat16 similarities of long rows: scaled after every chain of features",
        "first < used ? nullptr : rows, col_scale);",
        "rows, col_scale);",
        "tests/test_cpu.py::test_any_number_of_features[avx512_bf16-dtype2-1000]",
    ),
    variant="avx512_bf16",
)
plant(
    "csrc/cpu/half.h",
    (
        "bfloat16 weights: the scales of two rows that share a word are swapped",
        "_mm512_cvtne2ps_pbh(b * low, a * up)",
        "_mm512_cvtne2ps_pbh(b * up, a * low)",
        half(),
    ),
    (
        "bfloat16 rows: the power of two of their scale is left out",
        "const float once = scale == 0 ? 0.f : __builtin_ldexpf(1.f, half),",
        "const float once = scale == 0 ? 0.f : 1.f,",
        "tests/test_cpu.py::test_bfloat16_ignores_the_scale_of_rows[avx512_bf16-1e+18]",
    ),
    variant="avx512_bf16",
)
plant(
    "csrc/cpu/amx.h",
    (
        "AMX gradient: rows beyond the last whole tile are left out",
        "padded(other.rows, 32) / 32, c0, c1);",
        "other.rows / 32, c0, c1);",
        half(),
    ),
    (
        "AMX gradient: the other side's product takes W instead of its transpose",
        "if (j.wanted && !diagonal) add_product(s, transposed(workspace), i, j);",
        "if (j.wanted && !diagonal) add_product(s, across(workspace), i, j);",
        half(),
    ),
    (
        "AMX similarities: the second tile of columns is the first",
        "second(c), second(c + 16), n_pairs / 16,",
        "second(c), second(c), n_pairs / 16,",
        half("59-33-48"),
    ),
    variant="amx_emulated",
)

# --- the CUDA kernels, emulated -------------------------------------------------------------------

LEFT_OUT_OF_TILES = "tests/test_cuda.py::test_ids_and_gaps_over_several_tiles"
plant(
    "csrc/cuda/walk.h",
    (
        "last partial tile: columns that do not exist count",
        "return position < special || (ragged && tile(position) == tiles - 1);",
        "return position < special;",
        cuda(INFONCE),
    ),
    (
        "ids: two rows of one id meet in the other columns of a tile",
        "bits &= ~(1u << Fragment::number(r, q));",
        "bits &= ~(1u << Fragment::number(r, 0));",
        f"{LEFT_OUT_OF_TILES}[{INFONCE}]",
    ),
    (
        "exclusion: neither the anchor itself nor its positive is masked",
        "(block * row_pairs + row_pairs - 1) / column_pairs - first) + 1 : 0;",
        "(block * row_pairs + row_pairs - 1) / column_pairs - first) : 0;",
        cuda(INFONCE),
    ),
    variant="FLOAT64",
)
plant(
    "csrc/cuda/sweeps.h",
    (
        "online softmax: sums so far are not rescaled to the new maximum",
        "total(r, k) *= factor, comp(r, k) *= factor;",
        "comp(r, k) *= factor;",
        cuda(INFONCE),
    ),
    (
        "∂L/∂τ from pairs: the baseline is ignored",
        "sums[DTAU] += y.dtau * (moment - side.baseline);",
        "sums[DTAU] += y.dtau * moment;",
        cuda(THROUGH),
    ),
    (
        "gaps: a column's limit is overlooked in the gradient",
        "if (a.cols_anchor && side_j.takes(compared)) {",
        "if (a.cols_anchor) {",
        f"{LEFT_OUT_OF_TILES}[{INFONCE}]",
    ),
    (
        "gaps: log-weights count as similarity in the CUDA kernels",
        "return {t, weighted ? unbiased : t};",
        "return {t, t};",
        "tests/test_max_gap.py::test_gaps_have_neither_weights_nor_temperatures[cuda-False]",
    ),
    (
        "gradient: the columns' anchors do not weigh",
        "w += weigh(y, x.t, side_j);",
        "w += 0;",
        cuda(TRIPLET),
    ),
    variant="FLOAT64",
)
plant(
    "csrc/cuda/rows.h",
    (
        "positive term: both anchors of a pair weigh as the first one",
        "weights[row[0]] + weights[row[1]]",
        "2 * weights[row[0]]",
        "tests/test_cuda.py::test_rows_steps",
    ),
    variant="FLOAT64",
)

# --- the Triton kernels, interpreted --------------------------------------------------------------

plant(
    "kernels/sweeps.py",
    (
        "split-K: the last column tiles are left out where the splits do not divide them",
        "each = tl.cdiv(end - begin, splits)",
        "each = (end - begin) // splits",
        "tests/test_triton.py::test_parts_that_do_not_divide_a_ring",
    ),
    (
        "last partial tile: columns that do not exist count",
        "ragged = tl.where(n_cols % S.BLOCK_N != 0, (2 * tiles - 1 - first) % tiles, -1)",
        "ragged = -1",
        triton(INFONCE),
    ),
    (
        "exclusion: the anchor itself and its positive count",
        "keep = keep & (i.pair[:, None] != j.pair[None, :])",
        "keep = keep",
        triton(INFONCE),
    ),
    (
        "exclusion by ids: a pair with one id counts",
        "keep = keep & (i.ids[0][:, None] != j.ids[0][None, :])",
        "keep = keep",
        f"{IDS}test_forms_of_the_triton_kernels",
    ),
    (
        "online softmax: a tile's sums are not rescaled to the common maximum",
        "_times(sums, tl.exp(tile_largest[0] - finite))",
        "sums",
        "tests/test_backends.py::test_rectangle_of_two_processes_rows[triton-7-19-True]",
    ),
    (
        "∂L/∂τ from pairs: the baseline is ignored",
        "dtau[0] * _minus(_minus(t, side.moment_origin, axis), side.baseline, axis), axis",
        "dtau[0] * _minus(t, side.moment_origin, axis), axis",
        triton(THROUGH),
    ),
    (
        "gradient through α: the baseline is ignored",
        "g = f[0] + df[0] * _minus(_minus(t, side.moment_origin, axis), side.baseline, axis)",
        "g = f[0] + df[0] * _minus(t, side.moment_origin, axis)",
        triton(THROUGH),
    ),
    (
        "constant shift: the columns' anchors do not weigh in the gradient",
        "(i.row_weight[0] * c.inv_unit)[:, None] + (j.row_weight[0] * c.inv_unit)[None, :]",
        "(i.row_weight[0] * c.inv_unit)[:, None]",
        triton(INFONCE),
    ),
    (
        "euclidean: the columns' bias is not added",
        "t = t + (i.bias[0][:, None] + j.bias[0][None, :])",
        "t = t + i.bias[0][:, None]",
        shared_ring(INFONCE),
    ),
    (
        "linear kinds: the offset is not added to the argument",
        "x = x + tl.expand_dims(side.argument_offset[0], axis)",
        "x = x + 0",
        triton(SQUARE),
    ),
)
plant(
    "kernels/rows.py",
    (
        "split-K reduction of the online softmax: splits are added without a common shift",
        "                x *= libdevice.exp(own - finite[None, :])\n",
        "                x *= 1\n",
        "tests/test_rows.py::test_reduce_splits[2-ONLINE]",
    ),
    (
        "split-K reduction: slices beyond the first sixteen are left out",
        "y = tl.sum(x, 0) - comp",
        "y = tl.sum(x, 0) * (first == 0) - comp",
        "tests/test_rows.py::test_reduce_splits[37-PLAIN]",
    ),
    (
        "TF32: the bits that are too many are cut off, not rounded",
        "(x.to(tl.int32, bitcast=True) + 0x1000)",
        "(x.to(tl.int32, bitcast=True) + 0)",
        "tests/test_rows.py::test_rows_as_tf32_numbers[None-17]",
    ),
    (
        "constant shift: the row weight is rescaled with the wrong sign",
        "weight *= libdevice.exp(constant_shift - tl.load(shift_ptr + row, mask=keep, other=0.0))",
        "weight *= libdevice.exp(tl.load(shift_ptr + row, mask=keep, other=0.0) - constant_shift)",
        "tests/test_rows.py::test_scaled_weights[300-torch.float64]",
    ),
    (
        "positive term: a row is pulled to itself instead of its partner",
        "return u1, u2, g1 - q[:, None] * u2, g2 - q[:, None] * u1",
        "return u1, u2, g1 - q[:, None] * u1, g2 - q[:, None] * u2",
        "tests/test_rows.py::test_finish_rows[torch.float64-17-None]",
    ),
    (
        "cosine in chunks of features: earlier squares are lowered once, not twice",
        "squares = squares * (lowered * lowered)[:, None] + x * x",
        "squares = squares * lowered[:, None] + x * x",
        "tests/test_rows.py::test_unit_rows[torch.float64-96-32]",
    ),
)
plant(
    "alphacl_fast/graph.py",
    (
        "compiled formulas: an odd power loses its last factor",
        "return mul(square, a) if q % 2 else square",
        "return square",
        "tests/test_trace.py::test_operation[pow_3]",
    ),
    (
        "compiled formulas: a difference ignores its factor alpha",
        'return Node("sub", real(a), mul(b, alpha))',
        'return Node("sub", real(a), real(b))',
        "tests/test_trace.py::test_operation[sub]",
    ),
    (
        "compiled formulas: a lower bound is ignored",
        'a = a if min is None else _function("maximum", a, min)',
        "a = a if min is None else a",
        "tests/test_trace.py::test_operation[clamp]",
    ),
    (
        "compiled formulas: division by a constant multiplies by it",
        "return mul(a, 1.0 / b)",
        "return mul(a, b)",
        "tests/test_trace.py::test_operation[div]",
    ),
)
plant(
    "alphacl_fast/backend/gpu.py",
    (
        "split-K: the gradient is the first split's",
        "return tuple(x[0] if x.shape[0] == 1 else x.sum(0) for x in (df, weight_sums, sums))",
        "return tuple(x[0] for x in (df, weight_sums, sums))",
        shared_ring(TRIPLET),
    ),
)
NOT_FINITE = "tests/test_fuzz.py::test_what_is_not_finite_comes_out_and_does_not_hang"
EVERY_LENGTH = "tests/test_numerics.py::test_rows_of_every_length_in_one_batch"
SIDES = "tests/test_cuda_hopper.py::test_both_sides_of_a_tile"
plant(
    "csrc/cuda/hopper.h",
    (
        "hopper.h: rows that do not exist count for columns",
        "if (a.symmetric && (block + 1) * BLOCK_ROWS > a.n_rows) special = to;",
        "",
        f"{SIDES}[390-exp]",
    ),
    (
        "hopper.h: half way round an even ring both ends serve a tile",
        "to > tiles / 2) to = tiles / 2;",
        "to > tiles / 2) to = to;",
        f"{SIDES}[256-exp]",
    ),
    (
        "hopper.h: a warp's column sums are lost",
        "for (int w = 0; w < WARPS; ++w) sum += spread[w * N + thread];",
        "for (int w = 1; w < WARPS; ++w) sum += spread[w * N + thread];",
        f"{SIDES}[128-exp]",
    ),
    variant="BFLOAT16",
)
plant(
    "csrc/cuda/hopper.h",
    (
        "float16 weights: a row's sum keeps its factor when the factor changes",
        "acc[4 * d + 2 * r] *= factor, acc[4 * d + 2 * r + 1] *= factor;",
        "acc[4 * d + 2 * r] *= factor;",
        "tests/test_cuda_hopper.py::test_a_large_float16_weight_late_in_a_row",
    ),
    (
        "float16 weights: those of no tile are too small",
        "largest[r] * factor[r] >= LEAST && largest",
        "largest",
        "tests/test_cuda_hopper.py::test_small_float16_weights_keep_their_digits[40-exp]",
    ),
    (
        "float16 weights: those of no tile are too large",
        "&& largest[r] * factor[r] <= MOST;",
        ";",
        "tests/test_cuda_hopper.py::test_a_large_float16_weight_late_in_a_row",
    ),
    variant="FLOAT16",
)
TF32_ROWS = "tests/test_cuda_hopper.py::test_gradients_of_rows_in_one_direction[64-exp]"
plant(
    "csrc/cuda/hopper.h",
    (
        "hopper.h: weights of TF32 rows are cut off",
        "to[eight][e] = rounded_to_tf32(x[e % 2 * 2 + e / 2]);",
        "to[eight][e] = device::to_bits(x[e % 2 * 2 + e / 2]);",
        TF32_ROWS,
    ),
    (
        "hopper.h: transposed columns are in another order than their weights",
        "const int column = 2 * i + piece % 2;",
        "const int column = i + 4 * (piece % 2);",
        TF32_ROWS,
    ),
    (
        "hopper.h: nobody waits for a transposed tile",
        "if constexpr (TRANSPOSED) device::barrier_wait(M::turned(at.stage), at.phase);",
        "",
        "tests/test_cuda_hopper.py::test_the_stages_of_tf32_go_round[64]",
    ),
    variant="TFLOAT32",
)
plant(
    "alphacl_fast/backend/cuda.py",
    (
        "TF32 on warpgroups: the tensor cores get rows with more bits than they read",
        "self.f = rounded_rows(self.f)",
        "self.f = self.f",
        TF32_ROWS,
    ),
)
plant(
    "csrc/cuda/rows.h",
    (
        "normalisation: huge bfloat16 rows are stored as they are",
        "exponent >= bias - 30 && exponent < bias + 30",
        "exponent >= bias - 30",
        f"{EVERY_LENGTH}[unit_rows-torch.bfloat16-cuda]",
    ),
    variant="BFLOAT16",
)
plant(
    "csrc/cuda/sweeps.h",
    (
        "weights of long rows: the second view's columns follow the first's directly",
        "(j < half ? j : columns / 2 + j - half)",
        "j",
        "tests/test_cuda.py::test_slices_come_in_runs[two_view]",
    ),
    variant="BFLOAT16",
)
plant(
    "alphacl_fast/backend/triton.py",
    (
        "TF32: the tensor cores get rows with more bits than they read",
        "self.f = _kernels().rows.rounded_rows(self.f)",
        "self.f = self.f",
        "tests/test_triton.py::test_rows_are_rounded_to_tf32",
    ),
)
plant(
    "alphacl_fast/backend/reference.py",
    (
        "ids: a temperature has no gradient where no anchor has negatives",
        "losses.append((anchor * 0).sum() + tau * 0)",
        "losses.append((anchor * 0).sum())",
        "tests/test_ids.py::test_a_temperature_has_a_gradient_without_negatives[reference]",
    ),
)
plant(
    "kernels/rows.py",
    (
        "normalisation: tiny bfloat16 rows are stored as they are",
        "extreme = (lift > LIMIT) | (lift * LIMIT <= 1)",
        "extreme = lift * LIMIT <= 1",
        f"{EVERY_LENGTH}[unit_rows-torch.bfloat16-triton]",
    ),
)
plant(
    "alphacl_fast/autograd.py",
    (
        "normalisation in PyTorch: the scale ignores the power of two",
        "(1 / norm) / (safe * lift)",
        "(1 / norm) / safe",
        f"{EVERY_LENGTH}[torch-torch.bfloat16-blocked]",
    ),
)
plant(
    "alphacl_fast/bundles.py",
    (
        "row steps: vectors begin anywhere",
        "like.new_empty(count, -(-length // 4) * 4)[:, :length]",
        "like.new_empty(count, length)",
        f"tests/test_triton.py::test_alignment_does_not_change_with_the_batch_size[{SQUARE}]",
    ),
)
plant(
    "csrc/cpu/tile.h",
    (
        "slopes: the columns' anchors have the rows' shift",
        "x = (t - load(p.col.shift + c)) + load(p.col.argument_offset + c);",
        "x = (t - p.row.shift[r]) + load(p.col.argument_offset + c);",
        portable(TRIPLET),
    ),
    (
        "slopes: an excluded pair has a weight",
        "if (Masked) f = keep ? f : Vec<T>{}, df = keep ? df : Vec<T>{};",
        "if (Masked) f = keep ? f : Vec<T>{};",
        portable(TRIPLET),
    ),
    variant="portable",
)
GAP = "tests/test_max_gap.py::"
plant(
    "csrc/cpu/tile.h",
    (
        "max_gap: the columns' anchors have the rows' limit",
        "above_cols |= t > load(p.col.largest_t + c);",
        "above_cols |= t > broadcast<T>(p.row.largest_t[0]);",
        f"{GAP}test_every_instruction_set[portable-infonce]",
    ),
    (
        "max_gap: the gradient counts every pair",
        "if (s.gradient) return ConstantShiftGradient<T, K, Factors, Marked>::run;",
        "if (s.gradient) return ConstantShiftGradient<T, K, Factors, false>::run;",
        f"{GAP}test_every_instruction_set[portable-infonce]",
    ),
    (
        "max_gap: a kept tile's pairs all count",
        "return marked ? KeptGradient<T, true>::run",
        "return marked ? KeptGradient<T, false>::run",
        f"{GAP}test_every_instruction_set[portable-infonce]",
    ),
    (
        "guide: a similarity that equals the limit does not count",
        "above_row |= t > broadcast<T>(p.row.largest_guide[r])",
        "above_row |= t >= broadcast<T>(p.row.largest_guide[r])",
        "tests/test_guide.py::test_whole_numbers_at_the_limit_count[cpu]",
    ),
    (
        "guide: the columns' anchors have the rows' limit",
        "above_cols |= t > load(p.col.largest_guide + c);",
        "above_cols |= t > broadcast<T>(p.row.largest_guide[0]);",
        "tests/test_guide.py::test_every_instruction_set[dtype0-portable]",
    ),
    variant="portable",
)
plant(
    "csrc/cpu/kernels.cpp",
    (
        "max_gap: log-weights count as similarity",
        "const bool weighted = s.weighted && p.marked;",
        "const bool weighted = false;",
        f"{GAP}test_gaps_have_neither_weights_nor_temperatures[cpu-False]",
    ),
    variant="portable",
)
plant(
    "csrc/cpu/kept.h",
    (
        "kept tiles: the marks of a tile lie in the next one",
        "at + size_ : nullptr",
        "at + size_ + marks_ : nullptr",
        "tests/test_guide.py::test_same_bits_for_any_workspace_and_threads[two_view-member0]",
    ),
    variant="portable",
)
plant(
    "csrc/cpu/same_id.h",
    (
        "equal ids: the share of a positive is subtracted from 1",
        "return vexpm1<T>(g - log_mean) * among - others;",
        "return vexp<T>(g - log_mean) * among - 1;",
        f"{SUPCON}test_exact_once_trained[cpu-2-out]",
    ),
    (
        "equal ids: the anchor is one of its positives",
        "const bool inside = own >= first && own < last;",
        "const bool inside = false;",
        f"{SUPCON}test_equals_the_dense_formula[any-in-cpu]",
    ),
    variant="portable",
)
plant(
    "csrc/cpu/step.h",
    (
        "max_gap: an anchor without negatives has a loss",
        "own(StepPlan::EMPTY)[x.at + r] = T(sums()[F * plan_.padded + x.at + r] == 0);",
        "own(StepPlan::EMPTY)[x.at + r] = 0;",
        f"{GAP}test_equals_reference[infonce(epsilon=0.0,temperature_scaled=True)]",
    ),
)
plant(
    "alphacl_fast/autograd.py",
    (
        "max_gap: the limit ignores the positive",
        "None if call.max_gap is None else self.pos + call.most_gap(self.pos.dtype)",
        "None if call.max_gap is None else 0 * self.pos + call.most_gap(self.pos.dtype)",
        f"{GAP}test_equals_reference[{TRIPLET}]",
    ),
    (
        "max_gap: all negatives are counted",
        "self._n_neg, self._empty = count.clamp(min=1), count == 0",
        "self._n_neg, self._empty = count * 0 + self.layout.n_neg, count == 0",
        f"{GAP}test_equals_reference[alpha_entropy(alpha_eps=0.2,detach_alpha=True)]",
    ),
)
plant(
    "kernels/sweeps.py",
    (
        "max_gap: pairs below the limit are left out",
        "x = tl.where(t > tl.expand_dims(side.largest_t[0], axis), other, x)",
        "x = tl.where(t < tl.expand_dims(side.largest_t[0], axis), other, x)",
        f"{GAP}test_an_infinite_gap_changes_nothing[triton]",
    ),
    (
        "max_gap: log-weights count as similarity in the Triton kernels",
        "        return unbiased\n",
        "        return t\n",
        f"{GAP}test_gaps_have_neither_weights_nor_temperatures[triton-False]",
    ),
)

EDGES = "tests/test_edges.py::"
plant(
    "alphacl_fast/objectives.py",
    (
        "the key of an objective leaves out its options",
        'objective.key = f"{name} {json.dumps(checked)}"',
        'objective.key = f"{name} {{}}"',
        f"{EDGES}test_an_exported_loss_is_the_same_in_another_process",
    ),
)
plant(
    "alphacl_fast/autograd.py",
    (
        "many gradients at once: every one is the first",
        "each = [run(one.contiguous()) for one in grads]",
        "each = [run(grads[0].contiguous()) for one in grads]",
        f"{EDGES}test_many_gradients_at_once[loss_against-none]",
    ),
)
plant(
    "alphacl_fast/functional.py",
    (
        "a temperature that changes is a constant of the graph",
        "statically_known_true(number < _FAR)",
        "True",
        f"{EDGES}test_a_schedule_of_floats_needs_two_graphs[temperature]",
    ),
)
plant(
    "alphacl_fast/one_operator.py",
    (
        "a loss as one operator: the incoming gradient is ignored",
        "found = [(x * grad).to(x.dtype) for x in found]",
        "found = [x for x in found]",
        f"{EDGES}test_composed_losses_at_any_batch_size_and_temperature",
    ),
)
plant(
    "alphacl_fast/micro_batch.py",
    (
        "micro-batches overlap",
        "starts = range(0, rows, size)",
        "starts = range(0, rows, max(1, size - 1))",
        "tests/test_micro_batch.py::test_the_gradient_is_that_of_the_whole_batch[4]",
    ),
    (
        "the second pass updates the running statistics again",
        "setattr(layer, name, buffer.clone())",
        "pass",
        "tests/test_micro_batch.py::test_batch_normalisation_is_updated_once_for_each_micro_batch",
    ),
)

# --- the trainer ----------------------------------------------------------------------------------

plant(
    "alphacl_fast/train/storage.py",
    (
        "checkpoints: the digest is not compared",
        "good = comment == _MARK + hasher(body).hexdigest().encode()",
        "good = True",
        "tests/test_train.py::test_a_damaged_checkpoint_falls_back_to_the_one_before[0.3]",
    ),
    (
        "locks: two processes may hold one",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "tests/test_train.py::test_one_process_at_a_time_uses_a_run",
    ),
    (
        "older checkpoints: the newest of them overwrites the others",
        "for age in range(keep - 1, 1, -1):",
        "for age in range(keep - 1, 2, -1):",
        "tests/test_train.py::test_checkpoints_are_kept_in_order",
    ),
)
plant(
    "alphacl_fast/train/loop.py",
    (
        "resuming: the averaged weights begin again",
        'self.average.load_state_dict(state["ema"])',
        "pass",
        "tests/test_train_features.py::test_all_of_it_resumes_bit_for_bit",
    ),
    (
        "resuming: the scale of float16 begins again",
        'self.scaler.load_state_dict(state.get("scaler", {}))',
        "pass",
        "tests/test_train_features.py::test_all_of_it_resumes_bit_for_bit",
    ),
    (
        "held-out images: the worst evaluation is kept",
        "if found[judged_by] > self.best.get(",
        "if found[judged_by] < self.best.get(",
        "tests/test_train_features.py::test_the_test_images_are_scored_once_with_the_best_weights",
    ),
)
plant(
    "alphacl_fast/train/moco.py",
    (
        "queue: new keys always replace the first ones",
        "self.place.copy_((self.place + len(keys)) % rows)",
        "self.place.copy_(self.place % rows)",
        "tests/test_train_recipes.py::test_the_queue_keeps_the_latest_keys_in_a_ring",
    ),
    (
        "momentum encoder: the decay is that of the other network",
        "ours, 1 - momentum)",
        "ours, momentum)",
        "tests/test_train_recipes.py::test_keys_follow_and_have_no_gradient",
    ),
)
plant(
    "alphacl_fast/train/process_context.py",
    (
        "sums over ranks: the derivative is this rank's alone",
        "return all_reduce(x, group=context.group_of(x))",
        "return x + (all_reduce(x, group=context.group_of(x)) - x).detach()",
        "tests/test_train_features.py::test_synchronised_normalisation_is_that_of_the_whole_batch[2]",
    ),
)
AVERAGED = (
    "tests/test_train_gradient_average.py::test_gradients_are_averaged_while_the_backward_runs"
)
plant(
    "alphacl_fast/train/gradient_average.py",
    (
        "averages over ranks: sums",
        "_unpack(flat.div_(self.context.size), bucket)",
        "_unpack(flat, bucket)",
        f"{AVERAGED}[1-early0-late0-whole]",
    ),
    (
        "averages over ranks: the first micro-batch's gradient is sent",
        "if self.waits is None:  # of an earlier micro-batch",
        "if self.waits is None and self.begin() is not None:",
        f"{AVERAGED}[1-early0-late0-parts]",
    ),
    (
        "averages over ranks: nothing is sent before the backward has ended",
        "while len(self.sent) < len(self.waits) and self.waits[len(self.sent)] == 0:",
        "while False:",
        f"{AVERAGED}[200-early1-late1-whole]",
    ),
)
plant(
    "alphacl_fast/train/data.py",
    (
        "held-out images are trained on",
        "for index in range(len(images)) if index not in gone]",
        "for index in range(len(images))]",
        "tests/test_train_features.py::test_held_out_images_are_neither_trained_on_nor_tested",
    ),
)

GUIDE = "tests/test_guide.py::test_equals_dense_code"
plant(
    "alphacl_fast/backend/blocked.py",
    (
        "guide: the columns' anchors have no limit",
        "            x = x.masked_fill(self.guide > side.largest_guide, value)",
        "            x = x.masked_fill((self.guide > side.largest_guide) & (side.dim == 1), value)",
        f"{GUIDE}[two_view-True-infonce]",
    ),
)
plant(
    "alphacl_fast/guided.py",
    (
        "guide: the margin has the wrong sign",
        "(first * second).sum(1) - guide_margin",
        "(first * second).sum(1) + guide_margin",
        f"{GUIDE}[one_view-True-infonce]",
    ),
    (
        "guide: a copy of the positive is left out by rounding",
        "+ ROUNDING * torch.finfo",
        "- ROUNDING * torch.finfo",
        "tests/test_guide.py::test_copies_of_the_positive_count[blocked]",
    ),
)

PLANS = "tests/test_launches.py"
plant(
    "alphacl_fast/launches.py",
    (
        "plans: buffers share bytes while both are in use",
        "apart = other.last < buffer.made or buffer.last < other.made",
        "apart = other.last < buffer.last or buffer.last < other.last",
        f"{PLANS}::test_buffers_share_bytes_only_apart_in_time",
    ),
    (
        "plans: kernels start on the default stream",
        "values[instruction.stream] = stream",
        "values[instruction.stream] = 0",
        f"{PLANS}::test_kernels_start_on_the_current_stream",
    ),
    (
        "plans: a view begins where that of the recorded step did",
        "x = x.as_strided(view.size, view.stride, x.storage_offset() + view.start)\n"
        "                values[position] = x",
        "x = x.as_strided(view.size, view.stride, view.start)\n"
        "                values[position] = x",
        f"{PLANS}::test_operators_see_views_where_they_begin",
    ),
    (
        "plans: a shape that depends on the content of a tensor is recorded",
        "by_mask = any(",
        "by_mask = False and any(",
        f"{PLANS}::test_unknown_tensors_and_numbers_are_not_recorded",
    ),
)
plant(
    "alphacl_fast/steps.py",
    (
        "plans: strides are no part of the key",
        "_facts(z1), z1.stride(), z1.data_ptr() % 16",
        "_facts(z1), z1.data_ptr() % 16",
        f"{PLANS}::test_keys_tell_calls_apart",
    ),
    (
        "plans: the gradients of the two views are exchanged",
        "(dz[:n] if need_z1 else None), (dz[-n:] if need_z2 else None)",
        "(dz[-n:] if need_z1 else None), (dz[:n] if need_z2 else None)",
        f"{PLANS}::test_bits[triton-{{}}]",
    ),
    (
        "plans: autocast reaches the step",
        "torch.set_autocast_enabled(kind, False)",
        "pass",
        f"{PLANS}::test_the_device_of_the_views_is_current_during_a_step[False]",
    ),
)
# --- adapters -------------------------------------------------------------------------------------

CONTRACT = "tests/test_contract.py::"


def as_theirs(name: str, pairs: int = 11) -> str:
    return f"{CONTRACT}test_values_and_gradients[{pairs}-{name}]"


def odd_calls(name: str, matrix: bool = True) -> str:
    return f"{CONTRACT}test_odd_calls[pytorch_metric_learning.{name}-{matrix}]"


def dtype_of(name: str) -> str:
    return f"{CONTRACT}test_the_dtype_of_a_loss[{name}]"


PML = "pytorch_metric_learning"
ST = "sentence_transformers"
OVER_RANKS = f"{CONTRACT}test_processes_share_a_batch_as_theirs_do"
plant(
    "alphacl_fast/compat/entry.py",
    (
        "a loss in half precision is float32",
        "        return dtype\n    with torch.no_grad():",
        "        return torch.promote_types(dtype, torch.float32)\n    with torch.no_grad():",
        dtype_of("lightly.MACLLoss"),
    ),
    (
        "autocast does not change the dtype of a loss",
        "return of_logits(row @ row.t()).dtype",
        "return dtype",
        dtype_of("lightly.NTXentLoss"),
    ),
    (
        "what a loss does not depend on leaves the graph",
        "loss = loss + (x * 0).sum().to(loss.device, loss.dtype)",
        "loss = loss + 0",
        as_theirs("open_clip.ClipLoss"),
    ),
    (
        "labels that are no integers are rounded",
        "if not any(x.is_floating_point() for x in labels):",
        "if True:",
        f"{COMPAT}test_labels_may_be_any_numbers",
    ),
)
plant(
    "alphacl_fast/compat/info_nce.py",
    (
        "paired negatives: the positive does not count in the sum",
        "torch.logaddexp(sums, torch.zeros_like(sums))",
        "sums",
        as_theirs("info_nce.InfoNCE2"),
    ),
    (
        "unpaired negatives are not normalised",
        "unit_rows(query), unit_rows(negative_keys.flatten(0, -2))",
        "unit_rows(query), negative_keys.flatten(0, -2).double()",
        as_theirs("info_nce.InfoNCE1"),
    ),
)
plant(
    "alphacl_fast/compat/lightly.py",
    (
        "a bank forgets its newest rows",
        "self.bank_ptr[0] = 0 if end >= self.size[0] else end",
        "self.bank_ptr[0] = 0",
        f"{COMPAT}test_lightly_memory_bank",
    ),
    (
        "a bank that this step changes is what the backward sees",
        "bank = self._bank_on(output.device).clone()",
        "bank = self._bank_on(output.device)",
        as_theirs("lightly.NTXentLoss"),
    ),
    (
        "a negative temperature attracts",
        "sign = 1 if self.temperature > 0 else -1",
        "sign = 1",
        as_theirs("lightly.NTXentLoss"),
    ),
    (
        "the weights of positives lose their factor N",
        "return 2 - len(out0) * similarity.softmax(0)",
        "return 2 - similarity.softmax(0)",
        as_theirs("lightly.DCLWLoss"),
    ),
    (
        "weights of one order of the views alone",
        "self.weight_fn(first, second) + self.weight_fn(second, first)",
        "2 * self.weight_fn(first, second)",
        f"{COMPAT}test_weights_of_both_orders",
    ),
)
plant(
    "alphacl_fast/compat/open_clip.py",
    (
        "a process returns the mean of all although its loss is local",
        'reduction="none" if local else "mean"',
        'reduction="mean"',
        OVER_RANKS,
    ),
    (
        "small batches: a row is its own negative",
        "logits.fill_diagonal_(torch.finfo(logits.dtype).min)",
        "logits.fill_diagonal_(0.0)",
        f"{CONTRACT}test_small_batches[open_clip.ClipLoss]",
    ),
    (
        "small batches: no positives",
        "torch.full_like(logits, -1.0).fill_diagonal_(1.0)",
        "torch.full_like(logits, -1.0)",
        f"{CONTRACT}test_small_batches[open_clip.SigLipLoss]",
    ),
)
plant(
    "alphacl_fast/compat/pairs.py",
    (
        "a listed pair counts once, however often it is listed",
        "ones, accumulate=True)",
        "ones, accumulate=False)",
        as_theirs(f"{PML}.NTXentLoss2"),
    ),
    (
        "rows are positives of themselves",
        "equal.diagonal(rows.start).fill_(False)",
        "pass",
        odd_calls("SupConLoss"),
    ),
    (
        "pairs that are left out count in a sum",
        "x.masked_fill(~kept, torch.finfo(x.dtype).min)",
        "x",
        odd_calls("MultiSimilarityLoss"),
    ),
    (
        "circle: weights are no constants of the gradient",
        "held = t.detach()",
        "held = t",
        f"{CONTRACT}test_small_batches[{PML}.CircleLoss0]",
    ),
    (
        "tuplet margin: the angle grows by the margin",
        ".acos() - margin).cos()",
        ".acos() + margin).cos()",
        f"{CONTRACT}test_small_batches[{PML}.TupletMarginLoss0]",
    ),
)
plant(
    "alphacl_fast/compat/pytorch_metric_learning.py",
    (
        "the mean of positive pairs is one of anchors",
        "losses.sum() / call.positives().clamp(min=1)",
        "losses.mean()",
        as_theirs(f"{PML}.NTXentLoss0"),
    ),
    (
        "other rows without labels are no positives",
        "ref_labels = labels if ref_labels is None else ref_labels",
        "ref_labels = labels.clone() if ref_labels is None else ref_labels",
        odd_calls("SupConLoss"),
    ),
    (
        "zero losses enter a mean of losses that are not zero",
        "counted = ~(losses <= 0)",
        "counted = ~(losses < 0)",
        odd_calls("CircleLoss"),
    ),
    (
        "a distance that is no inner product is one",
        "distance.power != 1 or distance.p != 2",
        "distance.p != 2",
        f"{COMPAT}test_powers_of_similarities",
    ),
)
plant(
    "alphacl_fast/compat/ranking.py",
    (
        "hardness is no constant of the gradient",
        "return grad * ctx.share, None",
        "return grad, None",
        as_theirs(f"{ST}.MultipleNegativesRankingLoss1"),
    ),
    (
        "both directions: the positive pair counts once in the joint sum",
        'positive_pairs = 1 + ("doc_to_query" in sums)',
        "positive_pairs = 1",
        as_theirs(f"{ST}.MultipleNegativesRankingLoss1"),
    ),
    (
        "several processes: every one has the first one's positives",
        "return queries, torch.cat(docs), first",
        "return queries, torch.cat(docs), 0",
        OVER_RANKS,
    ),
)
plant(
    "alphacl_fast/compat/embedding.py",
    (
        "guide: the margin has the wrong sign",
        "positive - width * loss.margin +",
        "positive + width * loss.margin +",
        as_theirs(f"{ST}.GISTEmbedLoss0"),
    ),
    (
        "guide: what equals the positive is left out by rounding",
        "+ 8 * torch.finfo(positive.dtype).eps",
        "- 8 * torch.finfo(positive.dtype).eps",
        f"{COMPAT}test_a_guide_keeps_what_equals_the_positive",
    ),
    (
        "guide: of two sums the second replaces the first",
        "torch.where(some, torch.logaddexp(x, log_b), x)",
        "torch.where(some, y, x)",
        as_theirs(f"{ST}.GISTEmbedLoss0"),
    ),
    (
        "a cached loss forgets the directions",
        "self.loss.get_config_dict() | {",
        "{",
        as_theirs(f"{ST}.CachedMultipleNegativesSymmetricRankingLoss"),
    ),
)
plant(
    "alphacl_fast/compat/supcontrast.py",
    (
        "one view as anchors: all are",
        'anchors = len(rows) if self.contrast_mode == "all" else n',
        "anchors = len(rows)",
        as_theirs("supcontrast.SupConLoss0"),
    ),
)
EVIDENCE = "tests/test_evidence.py::test"
plant(
    "alphacl_fast/train/evidence.py",
    (
        "evidence: the images that judge a search are fitted on",
        "fitted[held] = False",
        "fitted[held] = True",
        f"{EVIDENCE}_images_that_judge_a_search_are_not_fitted_on",
    ),
    (
        "evidence: the worst run of a search is chosen",
        "return max(zip(search, found, strict=True)",
        "return min(zip(search, found, strict=True)",
        f"{EVIDENCE}_the_choice_is_the_best_finished_run",
    ),
    (
        "evidence: the learning rate grows with the batch size, not with its root",
        "(size / BATCH_SIZE) ** 0.5",
        "(size / BATCH_SIZE) ** 1.0",
        f"{EVIDENCE}_batch_sizes_use_the_choice_of_cifar10",
    ),
)
plant(
    "alphacl_fast/train/evidence_report.py",
    (
        "evidence: the standard error is s/n",
        "spread / math.sqrt(len(values))",
        "spread / len(values)",
        f"{EVIDENCE}_paired_differences_by_hand",
    ),
    (
        "evidence: Bonferroni's correction in place of Holm's",
        "min(1.0, (len(values) - place) * values[k])",
        "min(1.0, len(values) * values[k])",
        f"{EVIDENCE}_holm_by_hand",
    ),
    (
        "evidence: rounding errors break ties of differences",
        "round(values[seed] - base[seed], 9)",
        "values[seed] - base[seed]",
        f"{EVIDENCE}_rounding_errors_break_no_tie",
    ),
)
plant(
    "alphacl_fast/train/digit_augmentation.py",
    (
        "views of digits: they are sheared the other way",
        "[cos - sin * tan, sin + cos * tan, -sin, cos]",
        "[cos + sin * tan, sin - cos * tan, -sin, cos]",
        "tests/test_device_augmentation.py::test_views_of_digits_are_those_of_pillow[True]",
    ),
)
