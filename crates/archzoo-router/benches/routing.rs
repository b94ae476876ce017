//! The gate and the plan on one thread, in nanoseconds a token.

use std::time::Duration;

use archzoo_router::{Gate, GroupScore, Logits, Plan, Score, Threads, gate, plan};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const TOKENS: usize = 4096;

/// Sums of uniform numbers: near enough to a normal distribution for a router's logits.
fn random(len: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..len).map(|_| (next() + next() + next() + next() - 2.0) * 1.7).collect()
}

fn routing(criterion: &mut Criterion) {
    let (softmax, sigmoid, max) = (Score::Softmax, Score::Sigmoid, GroupScore::Max);
    for (experts, top_k, groups, top_groups, group_score, score) in [
        (64, 6, 1, 1, max, softmax),
        (160, 6, 8, 3, max, softmax),
        (256, 8, 8, 4, GroupScore::Top2Sum, sigmoid),
    ] {
        let logits = random(TOKENS * experts);
        let bias: Vec<f32> = random(experts).iter().map(|b| b / 10.0).collect();
        let v3 = score == Score::Sigmoid;
        let config = Gate {
            experts,
            top_k,
            score,
            bias: v3.then_some(&bias),
            groups,
            top_groups,
            group_score,
            renormalize: v3,
            scale: if v3 { 2.5 } else { 1.0 },
        };
        let n = TOKENS * top_k;
        let (mut weights, mut ids) = (vec![0.0; n], vec![0; n]);
        let mut group = criterion.benchmark_group(format!("{experts} experts, top {top_k}"));
        group.throughput(Throughput::Elements(TOKENS as u64));
        group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
        group.bench_function("gate", |bencher| {
            bencher.iter(|| gate(Threads::ONE, Logits::F32(&logits), &config, &mut weights, &mut ids));
        });
        let (mut order, mut inverse, mut token) = (vec![0; n], vec![0; n], vec![0; n]);
        let (mut counts, mut offsets) = (vec![0; experts], vec![0; experts]);
        group.bench_function("plan", |bencher| {
            bencher.iter(|| {
                let to = Plan {
                    order: &mut order,
                    inverse: &mut inverse,
                    token: &mut token,
                    counts: &mut counts,
                    offsets: &mut offsets,
                };
                plan(Threads::ONE, &ids, experts, top_k, to)
            });
        });
    }
}

criterion_group!(benches, routing);
criterion_main!(benches);
