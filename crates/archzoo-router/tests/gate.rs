//! The gate against a naive definition, on every instruction set of this CPU.

#![allow(clippy::unwrap_used)]

use archzoo_router::{Error, Gate, GroupScore, InstructionSet, Logits, Score, Threads, gate, gate_with};
use proptest::prelude::*;

const GOLDEN: Gate = Gate {
    experts: 8,
    top_k: 2,
    score: Score::Sigmoid,
    bias: None,
    groups: 4,
    top_groups: 2,
    group_score: GroupScore::Top2Sum,
    renormalize: true,
    scale: 2.5,
};
const GOLDEN_LOGITS: [f32; 8] = [2.0, -2.0, 1.0, 1.0, 0.0, 0.0, -1.0, 3.0];

fn route(config: &Gate, logits: Logits, tokens: usize) -> Result<(Vec<f32>, Vec<i64>), Error> {
    let mut weights = vec![f32::NAN; tokens * config.top_k];
    let mut ids = vec![-1; tokens * config.top_k];
    gate(Threads::ONE, logits, config, &mut weights, &mut ids)?;
    Ok((weights, ids))
}

#[test]
fn golden() {
    let biased = [0.0, 0.0, 0.2, 0.2, 0.0, 0.0, 0.0, -0.9];
    for (bias, expected) in [
        (None, [(7, 1.414_462), (2, 1.085_538)]),
        (Some([-2.0; 8]), [(7, 1.414_462), (2, 1.085_538)]),
        (Some(biased), [(2, 1.25), (3, 1.25)]),
    ] {
        let config = Gate { bias: bias.as_ref().map(|b| &b[..]), ..GOLDEN };
        let (weights, ids) = route(&config, Logits::F32(&GOLDEN_LOGITS), 1).unwrap();
        for (i, (id, weight)) in expected.into_iter().enumerate() {
            assert_eq!(ids[i], id);
            assert!((weights[i] - weight).abs() < 2e-6, "{weights:?}");
        }
    }
}

#[test]
fn refuses_bad_arguments_by_name() {
    let bias = [0.0; 7];
    let infinite = [f32::INFINITY; 8];
    for (config, message) in [
        (Gate { top_k: 0, ..GOLDEN }, "top_k must be in 1..=8 (the number of experts), found 0"),
        (Gate { top_k: 9, ..GOLDEN }, "top_k must be in 1..=8 (the number of experts), found 9"),
        (Gate { groups: 3, ..GOLDEN }, "groups must divide the 8 experts, found 3"),
        (Gate { groups: 0, ..GOLDEN }, "groups must divide the 8 experts, found 0"),
        (Gate { top_groups: 5, ..GOLDEN }, "top_groups must be in 1..=4 (the number of groups), found 5"),
        (Gate { top_groups: 0, ..GOLDEN }, "top_groups must be in 1..=4 (the number of groups), found 0"),
        (Gate { top_k: 5, ..GOLDEN }, "top_k must be at most 4 (the experts of 2 of 4 groups), found 5"),
        (Gate { bias: Some(&bias), ..GOLDEN }, "bias must have 8 values (one for each expert), found 7"),
        (Gate { bias: Some(&infinite), ..GOLDEN }, "bias must be finite, found inf at expert 0"),
        (Gate { scale: f32::NAN, ..GOLDEN }, "scale must be finite, found NaN"),
    ] {
        let error = route(&config, Logits::F32(&GOLDEN_LOGITS), 1).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
    assert!("relu".parse::<Score>().unwrap_err().to_string().contains("found \"relu\""));
    assert!("mean".parse::<GroupScore>().unwrap_err().to_string().contains("found \"mean\""));
    let error = gate(Threads::ONE, Logits::F32(&GOLDEN_LOGITS[..7]), &GOLDEN, &mut [], &mut []).unwrap_err();
    assert_eq!(error.to_string(), "logits must have 0 elements, found 7");
}

#[test]
fn names_the_first_token_that_is_not_a_number() {
    let tokens = 50_000;
    let mut logits = vec![0.5; tokens * 8];
    logits[31_000 * 8 + 7] = f32::NAN;
    logits[49_999 * 8] = f32::NAN;
    let error = route(&GOLDEN, Logits::F32(&logits), tokens).unwrap_err();
    assert_eq!(error, Error::NotANumber { token: 31_000 });
    assert!(error.to_string().contains("token 31000"));

    for score in [Score::Softmax, Score::SoftmaxTopK] {
        for bad in [f32::INFINITY, f32::NEG_INFINITY] {
            let config = Gate { score, groups: 1, top_groups: 1, top_k: 8, ..GOLDEN };
            let error = route(&config, Logits::F32(&[bad; 8]), 1).unwrap_err();
            assert_eq!(error, Error::NotANumber { token: 0 });
        }
    }
}

#[test]
fn an_infinite_logit_is_an_error_of_a_softmax_and_only_there() {
    let bias = [0.1; 128];
    for (at, value) in [(70, f32::INFINITY), (3, f32::NEG_INFINITY)] {
        let mut logits = vec![0.25; 128];
        logits[at] = value;
        for score in [Score::Softmax, Score::SoftmaxTopK, Score::Sigmoid] {
            for bias in [None, Some(&bias[..])] {
                for (top_k, groups, top_groups) in [(40, 1, 1), (8, 1, 1), (20, 8, 4)] {
                    let config = Gate { experts: 128, top_k, score, bias, groups, top_groups, ..GOLDEN };
                    let bad = value > 0.0 && score != Score::Sigmoid;
                    assert_eq!(route(&config, Logits::F32(&logits), 1).is_err(), bad, "{config:?}");
                }
            }
        }
    }
}

#[test]
fn no_tokens() {
    assert_eq!(route(&GOLDEN, Logits::F32(&[]), 0).unwrap(), (vec![], vec![]));
}

/// One row by the definition; none if two of the values that it compares are nearly equal, but not equal.
fn naive(config: &Gate, logits: &[f32]) -> Option<(Vec<f64>, Vec<i64>)> {
    let exp_sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    let score: Vec<f64> = logits
        .iter()
        .map(|&x| match config.score {
            Score::Softmax => f64::from(x).exp() / exp_sum,
            Score::Sigmoid => 1.0 / (1.0 + f64::from(-x).exp()),
            Score::SoftmaxTopK => f64::from(x),
        })
        .collect();
    let mut choice = score.clone();
    for (i, choice) in choice.iter_mut().enumerate() {
        *choice += config.bias.map_or(0.0, |b| f64::from(b[i]));
    }
    let size = config.experts / config.groups;
    let group_score: Vec<f64> = choice
        .chunks(size)
        .map(|group| {
            let mut group = group.to_vec();
            group.sort_by(|a, b| b.total_cmp(a));
            match config.group_score {
                GroupScore::Top2Sum => group.iter().take(2).sum(),
                GroupScore::Max => group[0],
            }
        })
        .collect();
    let kept = stable_top_k(&group_score, config.top_groups)?;
    for (i, choice) in choice.iter_mut().enumerate() {
        if !kept.contains(&(i / size)) {
            *choice = f64::NEG_INFINITY;
        }
    }
    let ids = stable_top_k(&choice, config.top_k)?;
    let mut weights: Vec<f64> = ids.iter().map(|&i| score[i]).collect();
    if config.score == Score::SoftmaxTopK {
        let sum: f64 = weights.iter().map(|w| w.exp()).sum();
        weights.iter_mut().for_each(|w| *w = w.exp() / sum);
    }
    if config.renormalize {
        let sum: f64 = weights.iter().sum::<f64>() + 1e-20;
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    weights.iter_mut().for_each(|w| *w *= f64::from(config.scale));
    Some((weights, ids.into_iter().map(|i| i as i64).collect()))
}

fn stable_top_k(values: &[f64], k: usize) -> Option<Vec<usize>> {
    // A tie in f64 may differ by its rounding; what the kernel computes in f32 is off by up to `NEAR`.
    const TIE: f64 = 1e-12;
    const NEAR: f64 = 2e-6;
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse((values[i] / TIE).round() as i64));
    let gaps = order.windows(2).map(|pair| values[pair[0]] - values[pair[1]]);
    if gaps.into_iter().any(|gap| gap > 10.0 * TIE && gap < NEAR) {
        return None;
    }
    order.truncate(k);
    Some(order)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn equals_the_definition_on_every_instruction_set(
        groups in 1usize..10,
        size in 1usize..40,
        top_groups in 1usize..10,
        top_k in 1usize..40,
        score in prop_oneof![Just(Score::Softmax), Just(Score::Sigmoid), Just(Score::SoftmaxTopK)],
        group_score in prop_oneof![Just(GroupScore::Top2Sum), Just(GroupScore::Max)],
        (renormalize, biased, format) in any::<(bool, bool, bool)>(),
        // Multiples of 1/8: many exact ties, and few near ones.
        values in prop::collection::vec(-24i8..24, 800),
        biases in prop::collection::vec(-3i8..3, 400),
    ) {
        let experts = groups * size;
        let top_groups = top_groups.min(groups);
        let top_k = top_k.min(size * top_groups);
        let tokens = values.len() / experts;
        let bias: Vec<f32> = biases[..experts].iter().map(|&b| f32::from(b) / 8.0).collect();
        let logits: Vec<f32> = values[..tokens * experts].iter().map(|&x| f32::from(x) / 8.0).collect();
        let bits: Vec<u16> = logits.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
        let config = Gate {
            experts, top_k, score, bias: biased.then_some(&bias[..]), groups, top_groups, group_score,
            renormalize, scale: 1.5,
        };
        let input = if format { Logits::F32(&logits) } else { Logits::Bf16(&bits) };
        let (weights, ids) = route(&config, input, tokens).unwrap();

        for set in InstructionSet::ALL.into_iter().filter(|set| set.is_supported()) {
            let (mut w, mut i) = (vec![f32::NAN; weights.len()], vec![-1; ids.len()]);
            gate_with(set, Threads::ONE, input, &config, &mut w, &mut i).unwrap();
            prop_assert_eq!(&i, &ids, "ids on {:?}", set);
            prop_assert_eq!(&w, &weights, "weights on {:?}", set);
        }
        for (token, row) in logits.chunks(experts).enumerate() {
            let Some((expected_weights, expected_ids)) = naive(&config, row) else { continue };
            let range = token * top_k..(token + 1) * top_k;
            prop_assert_eq!(&ids[range.clone()], &expected_ids[..]);
            for (&weight, &expected) in weights[range].iter().zip(&expected_weights) {
                prop_assert!((f64::from(weight) - expected).abs() < 2e-6, "{weight} for {expected}");
            }
        }
    }
}
