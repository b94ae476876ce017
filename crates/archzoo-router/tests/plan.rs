//! The plan and the placement against their properties.

#![allow(clippy::unwrap_used)]

use archzoo_router::{Cluster, Error, Placement, Plan, Threads, eplb, plan};
use proptest::prelude::*;
use rayon::ThreadPoolBuilder;

struct Sorted {
    order: Vec<i64>,
    inverse: Vec<i64>,
    token: Vec<i64>,
    counts: Vec<i32>,
    offsets: Vec<i32>,
}

fn sort(threads: Threads, ids: &[i64], experts: usize, top_k: usize) -> Result<Sorted, Error> {
    let n = ids.len();
    let mut to = Sorted {
        order: vec![-1; n],
        inverse: vec![-1; n],
        token: vec![-1; n],
        counts: vec![-1; experts],
        offsets: vec![-1; experts],
    };
    let places = Plan {
        order: &mut to.order,
        inverse: &mut to.inverse,
        token: &mut to.token,
        counts: &mut to.counts,
        offsets: &mut to.offsets,
    };
    plan(threads, ids, experts, top_k, places)?;
    Ok(to)
}

fn check(threads: Threads, ids: &[i64], experts: usize, top_k: usize) {
    let found = sort(threads, ids, experts, top_k).unwrap();
    let mut order: Vec<i64> = (0..ids.len() as i64).collect();
    order.sort_by_key(|&i| ids[i as usize]);
    assert_eq!(found.order, order);
    for (row, &i) in order.iter().enumerate() {
        assert_eq!(found.inverse[i as usize], row as i64);
        assert_eq!(found.token[row], i / top_k as i64);
    }
    let mut end = 0;
    for expert in 0..experts {
        let count = ids.iter().filter(|&&id| id == expert as i64).count() as i32;
        end += count;
        assert_eq!((found.counts[expert], found.offsets[expert]), (count, end));
    }
}

proptest! {
    #[test]
    fn the_plan_is_a_stable_sort(
        experts in 1usize..40, top_k in 1usize..5, ids in prop::collection::vec(any::<u32>(), 0..300),
    ) {
        let n = ids.len() / top_k * top_k;
        let ids: Vec<i64> = ids[..n].iter().map(|&id| i64::from(id) % (experts as i64 + 1)).collect();
        check(Threads::ONE, &ids, experts, top_k);
    }

    #[test]
    fn a_placement_fills_every_slot_and_keeps_groups_on_their_node(
        (nodes, gpus_per_node, group_size) in (1usize..4, 1usize..4, 1usize..4),
        (groups_per_node, more) in (1usize..4, 0usize..4),
        load in prop::collection::vec(0u16..1000, 2 * 27),
    ) {
        let groups = nodes * groups_per_node;
        let (experts, gpus) = (groups * group_size, nodes * gpus_per_node);
        let replicas = (experts.div_ceil(gpus) + more) * gpus;
        let load: Vec<f32> = load[..2 * experts].iter().map(|&x| f32::from(x)).collect();
        let (mut slots, mut rank) = (vec![-1; 2 * replicas], vec![-1; 2 * replicas]);
        let mut counts = vec![0; 2 * experts];
        let to = Placement { physical_to_logical: &mut slots, rank: &mut rank, counts: &mut counts };
        eplb(Threads::ONE, &load, Cluster { experts, replicas, groups, nodes, gpus }, to).unwrap();
        for layer in 0..2 {
            let counts = &counts[layer * experts..(layer + 1) * experts];
            prop_assert_eq!(counts.iter().sum::<i64>(), replicas as i64);
            let mut seen: Vec<Vec<i64>> = vec![vec![]; experts];
            let mut node_of_group = vec![None; groups];
            for slot in 0..replicas {
                let expert = slots[layer * replicas + slot] as usize;
                seen[expert].push(rank[layer * replicas + slot]);
                let node = slot / (replicas / nodes);
                prop_assert_eq!(*node_of_group[expert / group_size].get_or_insert(node), node);
            }
            for (ranks, &count) in seen.iter_mut().zip(counts) {
                ranks.sort_unstable();
                prop_assert!(count >= 1);
                prop_assert_eq!(&*ranks, &(0..count).collect::<Vec<i64>>());
            }
        }
    }
}

#[test]
fn several_threads_sort_alike() {
    let pool = ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for (top_k, experts) in [(8, 64), (3, 2)] {
        let n = 40_000 / top_k * top_k;
        let ids: Vec<i64> = (0..n as i64).map(|i| i * 7_919 % 104_729 % (experts as i64 + 1)).collect();
        check(Threads::new(&pool, 3), &ids, experts, top_k);
    }
}

#[test]
fn refuses_bad_arguments_by_name() {
    let message = |ids: &[i64], experts, top_k| match sort(Threads::ONE, ids, experts, top_k) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    assert_eq!(message(&[0, 1, 2, 5], 3, 2), "ids must be in 0..=3 (3 means no expert), found 5 at token 1");
    assert_eq!(message(&[-1], 3, 1), "ids must be in 0..=3 (3 means no expert), found -1 at token 0");
    assert!(message(&[], 0, 1).starts_with("experts must be in 1..=2147483647"));
    assert_eq!(message(&[0; 3], 3, 2), "top_k must divide the 3 assignments, found 2");
    assert_eq!(message(&[0; 3], 3, 0), "top_k must divide the 3 assignments, found 0");
    let short = Plan { order: &mut [], inverse: &mut [], token: &mut [], counts: &mut [], offsets: &mut [] };
    let error = plan(Threads::ONE, &[0], 1, 1, short).unwrap_err();
    assert_eq!(error.to_string(), "order must have 1 elements, found 0");
}
