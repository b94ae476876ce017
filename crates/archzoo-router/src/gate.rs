use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};

use archzoo_simd::math::{self, LANES, from_bf16, from_f16};
use archzoo_simd::multiversion;

use crate::parallel::Disjoint;
use crate::top_k::{self, Candidates, TOGETHER};
use crate::{Error, InstructionSet, Threads};

/// Row-major router logits `[tokens, experts]`.
#[derive(Debug, Clone, Copy)]
pub enum Logits<'a> {
    /// IEEE single.
    F32(&'a [f32]),
    /// Bits of bfloat16.
    Bf16(&'a [u16]),
    /// Bits of IEEE half.
    F16(&'a [u16]),
}

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each logit.
    Sigmoid,
    /// Choose by logit, then softmax over the chosen.
    SoftmaxTopK,
}

/// How a group of experts is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Sum of the two best of the group (of the one, in a group of one).
    Top2Sum,
    /// Best of the group.
    Max,
}

impl FromStr for Score {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "softmax" => Ok(Self::Softmax),
            "sigmoid" => Ok(Self::Sigmoid),
            "softmax_topk" => Ok(Self::SoftmaxTopK),
            _ => Err(Error::Argument(format!(
                "score must be \"softmax\", \"sigmoid\" or \"softmax_topk\", found {name:?}"
            ))),
        }
    }
}

impl FromStr for GroupScore {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "top2_sum" => Ok(Self::Top2Sum),
            "max" => Ok(Self::Max),
            _ => Err(Error::Argument(format!("group_score must be \"top2_sum\" or \"max\", found {name:?}"))),
        }
    }
}

/// How experts are chosen and weighted.
#[derive(Debug, Clone, Copy)]
pub struct Gate<'a> {
    /// Experts of the layer.
    pub experts: usize,
    /// Experts chosen for each token.
    pub top_k: usize,
    /// How logits become scores.
    pub score: Score,
    /// Added to the scores for the choice only, never to the weights.
    pub bias: Option<&'a [f32]>,
    /// Equal groups of neighbouring experts; 1 for none.
    pub groups: usize,
    /// Groups kept; experts of the others are out.
    pub top_groups: usize,
    /// How a group is scored.
    pub group_score: GroupScore,
    /// Divide the chosen weights by their sum.
    pub renormalize: bool,
    /// Factor on the weights, after that.
    pub scale: f32,
}

/// Elements of the logits from which on several threads share the work.
const PARALLEL: usize = 1 << 16;

/// Routes each token: its experts by descending choice score, the lowest id first among equals, and their
/// weights.
///
/// `weights` and `ids` are `[tokens, top_k]`, row-major.
pub fn gate(
    threads: Threads,
    logits: Logits,
    gate: &Gate,
    weights: &mut [f32],
    ids: &mut [i64],
) -> Result<(), Error> {
    gate_with(InstructionSet::current(), threads, logits, gate, weights, ids)
}

/// [`gate`] on a given instruction set (the baseline if this CPU lacks it).
pub fn gate_with(
    set: InstructionSet,
    threads: Threads,
    logits: Logits,
    gate: &Gate,
    weights: &mut [f32],
    ids: &mut [i64],
) -> Result<(), Error> {
    gate.check()?;
    let tokens = logits.len() / gate.experts;
    for (name, len, expected) in [
        ("logits", logits.len(), tokens * gate.experts),
        ("weights", weights.len(), tokens * gate.top_k),
        ("ids", ids.len(), tokens * gate.top_k),
    ] {
        if len != expected {
            return Err(Error::Argument(format!("{name} must have {expected} elements, found {len}")));
        }
    }
    let shared = logits.len() >= PARALLEL && threads.count() > 1;
    let tile = if shared { (PARALLEL / 4 / gate.experts).max(1) } else { tokens.max(1) };
    let (weights, ids) = (Disjoint::new(weights), Disjoint::new(ids));
    let fault = AtomicUsize::new(usize::MAX);
    threads.run(tokens.div_ceil(tile), |i| {
        let (start, len) = (i * tile * gate.top_k, tile * gate.top_k);
        // SAFETY: the parts of one tile.
        let (weights, ids) = unsafe { (weights.part(start, len), ids.part(start, len)) };
        route(set, logits, i * tile, gate, weights, ids, &fault);
    });
    match fault.into_inner() {
        usize::MAX => Ok(()),
        token => Err(Error::NotANumber { token }),
    }
}

impl Logits<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) | Self::F16(x) => x.len(),
        }
    }

    /// Copies the row from `start` on. False if it holds a NaN.
    #[inline(always)]
    fn copy_row(self, start: usize, to: &mut [f32]) -> bool {
        match self {
            Self::F32(x) => copy(&x[start..], to, |x| x),
            Self::Bf16(x) => copy(&x[start..], to, from_bf16),
            Self::F16(x) => copy(&x[start..], to, from_f16),
        }
    }
}

#[inline(always)]
fn copy<T: Copy>(from: &[T], to: &mut [f32], widen: impl Fn(T) -> f32) -> bool {
    let mut nan = false;
    for (to, &from) in to.iter_mut().zip(from) {
        *to = widen(from);
        nan |= to.is_nan();
    }
    !nan
}

impl Gate<'_> {
    /// Whether the arguments fit together.
    pub fn check(&self) -> Result<(), Error> {
        let Gate { experts, top_k, groups, top_groups, .. } = *self;
        let fault = |message: String| Err(Error::Argument(message));
        if top_k < 1 || top_k > experts {
            return fault(format!("top_k must be in 1..={experts} (the number of experts), found {top_k}"));
        }
        if groups < 1 || experts % groups != 0 {
            return fault(format!("groups must divide the {experts} experts, found {groups}"));
        }
        if top_groups < 1 || top_groups > groups {
            return fault(format!(
                "top_groups must be in 1..={groups} (the number of groups), found {top_groups}"
            ));
        }
        let kept = experts / groups * top_groups;
        if top_k > kept {
            return fault(format!(
                "top_k must be at most {kept} (the experts of {top_groups} of {groups} groups), found {top_k}"
            ));
        }
        if !self.scale.is_finite() {
            return fault(format!("scale must be finite, found {}", self.scale));
        }
        if let Some(bias) = self.bias {
            if bias.len() != experts {
                return fault(format!(
                    "bias must have {experts} values (one for each expert), found {}",
                    bias.len()
                ));
            }
            if let Some(expert) = bias.iter().position(|b| !b.is_finite()) {
                return fault(format!("bias must be finite, found {} at expert {expert}", bias[expert]));
            }
        }
        Ok(())
    }

    /// Whether the choice needs scores: without a bias or a sum over a group, the order of the logits is that of
    /// the scores, and finer.
    fn chooses_by_score(&self) -> bool {
        let sums_scores = self.top_groups < self.groups && self.group_score == GroupScore::Top2Sum;
        self.bias.is_some() || (sums_scores && self.score != Score::SoftmaxTopK)
    }
}

multiversion! {
    /// Routes the tokens of one tile; `fault` becomes the least bad token known.
    fn route(
        logits: Logits<'_>, first: usize, gate: &Gate<'_>, weights: &mut [f32], ids: &mut [i64],
        fault: &AtomicUsize,
    ) {
        // As few columns as the choice needs: a bound from more than k columns leaves fewer candidates.
        let done = match gate.top_k {
            0..=8 => rows::<16>(logits, first, gate, weights, ids),
            9..=16 => rows::<32>(logits, first, gate, weights, ids),
            _ => rows::<64>(logits, first, gate, weights, ids),
        };
        if let Err(token) = done {
            fault.fetch_min(token, Ordering::Relaxed);
        }
    }
}

/// `W`: columns of the search for the largest. An error is a bad token.
#[inline(always)]
fn rows<const W: usize>(
    logits: Logits,
    first: usize,
    gate: &Gate,
    weights: &mut [f32],
    ids: &mut [i64],
) -> Result<(), usize> {
    let (experts, top_k) = (gate.experts, gate.top_k);
    let padded = experts.next_multiple_of(W);
    // Pads are -inf in the logits and in the bias, so they weigh nothing and come last in any choice.
    let mut logit = vec![f32::NEG_INFINITY; TOGETHER * padded];
    let mut choice = vec![f32::NEG_INFINITY; TOGETHER * padded];
    let mut score = vec![0.0; padded];
    let mut bias = vec![f32::NEG_INFINITY; padded];
    bias[..experts].fill(0.0);
    if let Some(values) = gate.bias {
        bias[..experts].copy_from_slice(values);
    }
    let limited = gate.top_groups < gate.groups;
    let by_score = gate.chooses_by_score();
    let mut groups = Groups::new(gate);
    let mut chosen = vec![0u32; TOGETHER * top_k];
    let mut candidates = [const { Candidates::new() }; TOGETHER];
    let (mut max, mut sum) = ([0.0; TOGETHER], [1.0; TOGETHER]);

    let blocks = weights.chunks_mut(TOGETHER * top_k).zip(ids.chunks_mut(TOGETHER * top_k));
    for (block, (weights, ids)) in blocks.enumerate() {
        let first = first + block * TOGETHER;
        let count = ids.len() / top_k;
        for (i, logit) in logit.chunks_exact_mut(padded).enumerate().take(count) {
            if !logits.copy_row((first + i) * experts, &mut logit[..experts]) {
                return Err(first + i);
            }
        }
        let softmax = gate.score == Score::Softmax;
        if softmax && by_score {
            for (i, logit) in logit.chunks_exact(padded).enumerate().take(count) {
                max[i] = finite(math::max(logit)).ok_or(first + i)?;
                sum[i] = exp_sum(logit, max[i]);
            }
        }
        if by_score || limited {
            let rows = logit.chunks_exact(padded).zip(choice.chunks_exact_mut(padded));
            for (i, (logit, choice)) in rows.enumerate().take(count) {
                if !limited {
                    choice_scores(gate.score, logit, &bias, max[i], sum[i], choice);
                    continue;
                }
                if by_score {
                    choice_scores(gate.score, logit, &bias, max[i], sum[i], &mut score);
                }
                let for_groups = if by_score { &score } else { logit };
                let for_experts = if gate.bias.is_some() { &score } else { logit };
                if !groups.keep_best(for_groups, for_experts, choice) {
                    return Err(first + i);
                }
            }
        }
        let values = if by_score || limited { &choice } else { &logit };
        top_k::top_k::<W>(&values[..count * padded], padded, top_k, &mut candidates, &mut chosen);

        if softmax && !by_score {
            for (i, logit) in logit.chunks_exact(padded).enumerate().take(count) {
                max[i] = finite(logit[chosen[i * top_k] as usize]).ok_or(first + i)?;
                // Renormalised, the weights do not need the sum: those kept have the largest of it.
                if !gate.renormalize {
                    sum[i] = exp_sum(logit, max[i]);
                }
            }
        }
        let rows = weights.chunks_exact_mut(top_k).zip(ids.chunks_exact_mut(top_k));
        for (i, ((weights, ids), chosen)) in rows.zip(chosen.chunks_exact(top_k)).enumerate() {
            let logit = &logit[i * padded..(i + 1) * padded];
            for ((weight, id), &expert) in weights.iter_mut().zip(ids).zip(chosen) {
                *weight = logit[expert as usize] - max[i];
                *id = i64::from(expert);
            }
            if gate.score == Score::SoftmaxTopK {
                let max = weights.iter().copied().fold(f32::NEG_INFINITY, math::larger);
                let max = finite(max).ok_or(first + i)?;
                weights.iter_mut().for_each(|w| *w -= max);
            }
        }
        finish(gate, weights, &sum);
    }
    Ok(())
}

/// The largest logit of a softmax, unless it is infinite or none is above -inf.
#[inline(always)]
fn finite(max: f32) -> Option<f32> {
    max.is_finite().then_some(max)
}

/// From the chosen logits (less the maximum, for a softmax) to weights, for a block of tokens at once.
#[inline(always)]
fn finish(gate: &Gate, weights: &mut [f32], sums: &[f32]) {
    match gate.score {
        Score::Sigmoid => weights.iter_mut().for_each(|w| *w = 1.0 / (1.0 + math::exp(-*w))),
        _ => weights.iter_mut().for_each(|w| *w = math::exp(*w)),
    }
    for (weights, &sum) in weights.chunks_exact_mut(gate.top_k).zip(sums) {
        let kept = || weights.iter().sum::<f32>();
        let denominator = match gate.score {
            Score::SoftmaxTopK => kept(),
            _ if gate.renormalize => kept() + 1e-20 * sum,
            _ => sum,
        };
        let factor = gate.scale / denominator;
        weights.iter_mut().for_each(|w| *w *= factor);
    }
}

/// Scores and bias of a row.
#[inline(always)]
fn choice_scores(score: Score, logit: &[f32], bias: &[f32], max: f32, sum: f32, to: &mut [f32]) {
    let rows = to.iter_mut().zip(logit).zip(bias);
    match score {
        Score::Softmax => {
            let factor = 1.0 / sum;
            rows.for_each(|((to, &x), &bias)| *to = bounded_exp(x - max) * factor + bias);
        }
        Score::Sigmoid => {
            rows.for_each(|((to, &x), &bias)| *to = 1.0 / (1.0 + bounded_exp(math::smaller(-x, 88.0))) + bias)
        }
        Score::SoftmaxTopK => rows.for_each(|((to, &x), &bias)| *to = x + bias),
    }
}

/// Sum of `e^(x - max)` over lanes in a fixed order.
#[inline(always)]
fn exp_sum(x: &[f32], max: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    for row in x.as_chunks::<LANES>().0 {
        for (lane, &x) in lanes.iter_mut().zip(row) {
            *lane += bounded_exp(x - max);
        }
    }
    math::sum(&lanes)
}

/// `e^x` up to 88, but e^-87 below -87 (2e-38: nothing beside a score). Off by (1 + |x| / 2) / 2^23 of itself at
/// most, which no score or sum of scores feels: where |x| is large, the result or its share is small.
#[inline(always)]
fn bounded_exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    const LN2: f32 = std::f32::consts::LN_2;
    let x = math::larger(x, -87.0) * std::f32::consts::LOG2_E;
    let shifted = x + ROUND;
    let r = (x - (shifted - ROUND)) * LN2;
    // The Taylor polynomial of degree 6, in pairs: the terms of a pair do not wait for another.
    let r2 = r * r;
    let low = (1.0 + r) + r2 * (1.0 / 2.0 + r * (1.0 / 6.0));
    let high = (1.0 / 24.0 + r * (1.0 / 120.0)) + r2 * (1.0 / 720.0);
    let p = low + r2 * r2 * high;
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23)) // times 2^n
}

/// Choice of groups, with its buffers.
struct Groups {
    size: usize,
    count: usize,
    score: GroupScore,
    scores: Vec<f32>,
    kept: Vec<u32>,
    /// Infinity for the groups kept, -infinity for the others.
    limits: Vec<f32>,
}

impl Groups {
    fn new(gate: &Gate) -> Self {
        Self {
            size: gate.experts / gate.groups,
            count: gate.groups,
            score: gate.group_score,
            scores: vec![f32::NEG_INFINITY; gate.groups.next_multiple_of(LANES)],
            kept: vec![0; gate.top_groups],
            limits: vec![0.0; gate.groups],
        }
    }

    /// Copies `values`, with -inf for all but the groups of the best `scores`. False if a group's score is NaN.
    #[inline(always)]
    fn keep_best(&mut self, scores: &[f32], values: &[f32], to: &mut [f32]) -> bool {
        let scores = self.scores.iter_mut().zip(scores.chunks_exact(self.size)).take(self.count);
        match self.score {
            GroupScore::Top2Sum if self.size > 1 => scores.for_each(|(score, group)| {
                let (first, second) = two_best(group);
                *score = first + second;
            }),
            _ => scores.for_each(|(score, group)| *score = two_best(group).0),
        }
        if self.scores.iter().any(|score| score.is_nan()) {
            return false;
        }
        if let [scores] = self.scores.as_chunks::<LANES>().0 {
            let places = top_k::places(scores, self.count);
            for (limit, &place) in self.limits.iter_mut().zip(&places) {
                let is_kept = place < self.kept.len() as u64;
                *limit = if is_kept { f32::INFINITY } else { f32::NEG_INFINITY };
            }
        } else {
            top_k::sort(&self.scores, &mut self.kept);
            self.limits.fill(f32::NEG_INFINITY);
            self.kept.iter().for_each(|&group| self.limits[group as usize] = f32::INFINITY);
        }
        let groups = to.chunks_exact_mut(self.size).zip(values.chunks_exact(self.size));
        for ((to, from), &limit) in groups.zip(&self.limits) {
            for (to, &from) in to.iter_mut().zip(from) {
                *to = math::smaller(from, limit);
            }
        }
        true
    }
}

/// The largest and the second largest; -inf where there are fewer.
#[inline(always)]
fn two_best(values: &[f32]) -> (f32, f32) {
    let four = if values.len().is_multiple_of(8) {
        let (first, second) = two_best_of_lanes::<8>(values);
        halve::<8, 4>(first, second)
    } else if values.len().is_multiple_of(4) {
        two_best_of_lanes::<4>(values)
    } else {
        let ([first], [second]) = two_best_of_lanes::<1>(values);
        return (first, second);
    };
    let (first, second) = halve::<4, 2>(four.0, four.1);
    let ([first], [second]) = halve::<2, 1>(first, second);
    (first, second)
}

/// The two best of each column of rows of `N`.
#[inline(always)]
fn two_best_of_lanes<const N: usize>(values: &[f32]) -> ([f32; N], [f32; N]) {
    let mut first = [f32::NEG_INFINITY; N];
    let mut second = [f32::NEG_INFINITY; N];
    for row in values.as_chunks::<N>().0 {
        for ((second, first), &value) in second.iter_mut().zip(&first).zip(row) {
            *second = math::larger(*second, math::smaller(*first, value));
        }
        for (first, &value) in first.iter_mut().zip(row) {
            *first = math::larger(*first, value);
        }
    }
    (first, second)
}

/// The two best of each lane and the lane `H` further.
#[inline(always)]
fn halve<const N: usize, const H: usize>(first: [f32; N], second: [f32; N]) -> ([f32; H], [f32; H]) {
    let next = |i: usize| math::larger(second[i], second[i + H]);
    (
        std::array::from_fn(|i| math::larger(first[i], first[i + H])),
        std::array::from_fn(|i| math::larger(math::smaller(first[i], first[i + H]), next(i))),
    )
}
