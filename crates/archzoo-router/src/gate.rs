use std::str::FromStr;

use rayon::prelude::*;

use crate::top_k::top_k;
use crate::{Error, InstructionSet};
use archzoo_simd::math::{self, LANES, from_bf16, from_f16};

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
pub const PARALLEL: usize = 1 << 16;

/// Routes each token: its experts by descending choice score, the lowest id first among equals, and their
/// weights. Runs on rayon's current pool.
///
/// `weights` and `ids` are `[tokens, top_k]`, row-major.
pub fn gate(logits: Logits, gate: &Gate, weights: &mut [f32], ids: &mut [i64]) -> Result<(), Error> {
    gate_with(InstructionSet::current(), logits, gate, weights, ids)
}

/// [`gate`] on a given instruction set (the baseline if this CPU lacks it).
pub fn gate_with(
    set: InstructionSet,
    logits: Logits,
    gate: &Gate,
    weights: &mut [f32],
    ids: &mut [i64],
) -> Result<(), Error> {
    gate.check()?;
    match logits {
        Logits::F32(x) => run(set, x, |x| x, gate, weights, ids),
        Logits::Bf16(x) => run(set, x, from_bf16, gate, weights, ids),
        Logits::F16(x) => run(set, x, from_f16, gate, weights, ids),
    }
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
}

fn run<T: Copy + Sync>(
    set: InstructionSet,
    logits: &[T],
    to_f32: impl Fn(T) -> f32 + Copy + Sync,
    gate: &Gate,
    weights: &mut [f32],
    ids: &mut [i64],
) -> Result<(), Error> {
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
    let shared = logits.len() >= PARALLEL && rayon::current_num_threads() > 1;
    let tile = if shared { (PARALLEL / 4 / gate.experts).max(1) } else { tokens.max(1) };
    let route = |i: usize, logits: &[T], weights: &mut [f32], ids: &mut [i64]| {
        route_tile(set, logits, to_f32, gate, weights, ids).err().map(|token| i * tile + token)
    };
    let (tile_x, tile_k) = (tile * gate.experts, tile * gate.top_k);
    let fault = if shared {
        let tiles = weights.par_chunks_mut(tile_k).zip(ids.par_chunks_mut(tile_k));
        let tiles = logits.par_chunks(tile_x).zip(tiles).enumerate();
        tiles.filter_map(|(i, (x, (weights, ids)))| route(i, x, weights, ids)).min()
    } else {
        route(0, logits, weights, ids)
    };
    fault.map_or(Ok(()), |token| Err(Error::NotANumber { token }))
}

/// Picks the compiled version of [`route_rows`]. An error is the first bad token of the tile.
fn route_tile<T: Copy>(
    set: InstructionSet,
    logits: &[T],
    to_f32: impl Fn(T) -> f32 + Copy,
    gate: &Gate,
    weights: &mut [f32],
    ids: &mut [i64],
) -> Result<(), usize> {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
        fn avx2<T: Copy>(
            logits: &[T],
            to_f32: impl Fn(T) -> f32 + Copy,
            gate: &Gate,
            weights: &mut [f32],
            ids: &mut [i64],
        ) -> Result<(), usize> {
            route_rows(logits, to_f32, gate, weights, ids)
        }

        #[target_feature(enable = "avx2,bmi1,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<T: Copy>(
            logits: &[T],
            to_f32: impl Fn(T) -> f32 + Copy,
            gate: &Gate,
            weights: &mut [f32],
            ids: &mut [i64],
        ) -> Result<(), usize> {
            route_rows(logits, to_f32, gate, weights, ids)
        }

        if set.is_supported() {
            match set {
                // SAFETY: the CPU has just been asked for these features.
                InstructionSet::Avx2 => return unsafe { avx2(logits, to_f32, gate, weights, ids) },
                // SAFETY: as above.
                InstructionSet::Avx512 => return unsafe { avx512(logits, to_f32, gate, weights, ids) },
                InstructionSet::Baseline => {}
            }
        }
    }
    let _ = set;
    route_rows(logits, to_f32, gate, weights, ids)
}

#[inline(always)]
fn route_rows<T: Copy>(
    logits: &[T],
    to_f32: impl Fn(T) -> f32 + Copy,
    gate: &Gate,
    weights: &mut [f32],
    ids: &mut [i64],
) -> Result<(), usize> {
    // As few columns as the choice needs: a bound from more than k columns leaves fewer candidates.
    match gate.top_k {
        0..=8 => rows::<T, 16>(logits, to_f32, gate, weights, ids),
        9..=16 => rows::<T, 32>(logits, to_f32, gate, weights, ids),
        _ => rows::<T, 64>(logits, to_f32, gate, weights, ids),
    }
}

#[inline(always)]
fn rows<T: Copy, const W: usize>(
    logits: &[T],
    to_f32: impl Fn(T) -> f32 + Copy,
    gate: &Gate,
    weights: &mut [f32],
    ids: &mut [i64],
) -> Result<(), usize> {
    let experts = gate.experts;
    let padded = experts.next_multiple_of(W);
    // Pads are -inf in the logits and in the bias, so they weigh nothing and come last in any choice.
    let mut logit = vec![f32::NEG_INFINITY; padded];
    let mut score = vec![0.0; padded];
    let mut choice = vec![0.0; padded];
    let mut bias = vec![f32::NEG_INFINITY; padded];
    bias[..experts].fill(0.0);
    if let Some(values) = gate.bias {
        bias[..experts].copy_from_slice(values);
    }
    let mut groups = Groups::new(gate);
    let mut chosen = vec![0u32; gate.top_k];

    let rows = logits.chunks_exact(experts).zip(weights.chunks_exact_mut(gate.top_k));
    for (token, ((row, weights), ids)) in rows.zip(ids.chunks_exact_mut(gate.top_k)).enumerate() {
        let mut nan = false;
        for (to, &from) in logit[..experts].iter_mut().zip(row) {
            *to = to_f32(from);
            nan |= to.is_nan();
        }
        if nan {
            return Err(token);
        }
        match gate.score {
            Score::Sigmoid => {
                for (score, &x) in score.iter_mut().zip(&logit) {
                    *score = 1.0 / (1.0 + math::exp(-x));
                }
            }
            Score::Softmax => {
                let max = math::max(&logit);
                for (score, &x) in score.iter_mut().zip(&logit) {
                    *score = math::exp(x - max);
                }
                let sum = math::sum(&score);
                // An infinite logit, or none above -inf.
                if !max.is_finite() {
                    return Err(token);
                }
                for score in &mut score {
                    *score /= sum;
                }
            }
            Score::SoftmaxTopK => score.copy_from_slice(&logit),
        }
        for ((choice, &score), &bias) in choice.iter_mut().zip(&score).zip(&bias) {
            *choice = score + bias;
        }
        if gate.top_groups < gate.groups && !groups.drop_others(&mut choice) {
            return Err(token);
        }
        top_k::<W>(&choice, &mut chosen);
        for ((weight, id), &expert) in weights.iter_mut().zip(ids).zip(&chosen) {
            *weight = score[expert as usize];
            *id = i64::from(expert);
        }
        if gate.score == Score::SoftmaxTopK {
            let max = weights.iter().copied().fold(f32::NEG_INFINITY, math::larger);
            if !max.is_finite() {
                return Err(token);
            }
            weights.iter_mut().for_each(|w| *w = math::exp(*w - max));
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        if gate.renormalize {
            let sum = weights.iter().sum::<f32>() + 1e-20;
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        weights.iter_mut().for_each(|w| *w *= gate.scale);
    }
    Ok(())
}

/// Choice of groups, with its buffers.
struct Groups {
    size: usize,
    count: usize,
    score: GroupScore,
    scores: Vec<f32>,
    kept: Vec<u32>,
    is_kept: Vec<bool>,
}

impl Groups {
    fn new(gate: &Gate) -> Self {
        Self {
            size: gate.experts / gate.groups,
            count: gate.groups,
            score: gate.group_score,
            scores: vec![f32::NEG_INFINITY; gate.groups.next_multiple_of(LANES)],
            kept: vec![0; gate.top_groups],
            is_kept: vec![false; gate.groups],
        }
    }

    /// Sets the choice scores of all but the best groups to -inf. False if a group's score is NaN.
    #[inline(always)]
    fn drop_others(&mut self, choice: &mut [f32]) -> bool {
        let mut nan = false;
        for (score, group) in self.scores.iter_mut().zip(choice.chunks_exact(self.size)).take(self.count) {
            let (first, second) = two_best(group);
            *score = match self.score {
                GroupScore::Top2Sum if self.size > 1 => first + second,
                _ => first,
            };
            nan |= score.is_nan();
        }
        if nan {
            return false;
        }
        top_k::<LANES>(&self.scores, &mut self.kept);
        self.is_kept.fill(false);
        for &group in &self.kept {
            self.is_kept[group as usize] = true;
        }
        for (group, &is_kept) in choice.chunks_exact_mut(self.size).zip(&self.is_kept) {
            if !is_kept {
                group.fill(f32::NEG_INFINITY);
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
