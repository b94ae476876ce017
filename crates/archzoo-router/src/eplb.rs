//! Placement of replicated experts on GPUs so that each has about the same load (DeepSeek's EPLB).

use crate::parallel::Disjoint;
use crate::{Error, Threads};

/// Where the replicas go.
#[derive(Debug, Clone, Copy)]
pub struct Cluster {
    /// Experts of a layer.
    pub experts: usize,
    /// Slots for them on all GPUs together.
    pub replicas: usize,
    /// Equal groups of neighbouring experts that should stay on a node.
    pub groups: usize,
    /// Nodes; each has the same number of GPUs.
    pub nodes: usize,
    /// GPUs on all nodes together.
    pub gpus: usize,
}

/// The placement of each layer.
pub struct Placement<'a> {
    /// `[layers, replicas]`: the expert in each slot.
    pub physical_to_logical: &'a mut [i64],
    /// `[layers, replicas]`: which replica of that expert it is, from 0 on.
    pub rank: &'a mut [i64],
    /// `[layers, experts]`: replicas of each expert.
    pub counts: &'a mut [i64],
}

/// Places the experts of each layer by their `load` `[layers, experts]`.
///
/// If the nodes divide the groups, groups are packed onto nodes first and replicated inside them; else all
/// experts are replicated and packed at once.
pub fn eplb(threads: Threads, load: &[f32], cluster: Cluster, to: Placement) -> Result<(), Error> {
    let Cluster { experts, replicas, groups, nodes, .. } = cluster;
    cluster.check()?;
    let layers = load.len() / experts;
    for (name, len, expected) in [
        ("load", load.len(), layers * experts),
        ("physical_to_logical", to.physical_to_logical.len(), layers * replicas),
        ("rank", to.rank.len(), layers * replicas),
        ("counts", to.counts.len(), layers * experts),
    ] {
        if len != expected {
            return Err(Error::Argument(format!("{name} must have {expected} elements, found {len}")));
        }
    }
    if let Some(at) = load.iter().position(|x| !(x.is_finite() && *x >= 0.0)) {
        return Err(Error::Argument(format!(
            "load must be finite and at least 0, found {} for expert {} of layer {}",
            load[at],
            at % experts,
            at / experts
        )));
    }
    let cluster = if groups % nodes == 0 { cluster } else { Cluster { groups: 1, nodes: 1, ..cluster } };
    let (slots, ranks) = (Disjoint::new(to.physical_to_logical), Disjoint::new(to.rank));
    let counts = Disjoint::new(to.counts);
    threads.run(layers, |i| {
        // SAFETY: the parts of one layer.
        unsafe {
            place(
                &load[i * experts..(i + 1) * experts],
                cluster,
                slots.part(i * replicas, replicas),
                ranks.part(i * replicas, replicas),
                counts.part(i * experts, experts),
            );
        }
    });
    Ok(())
}

impl Cluster {
    fn check(self) -> Result<(), Error> {
        let Self { experts, replicas, groups, nodes, gpus } = self;
        let fault = |message: String| Err(Error::Argument(message));
        if experts < 1 || groups < 1 || experts % groups != 0 {
            return fault(format!("groups must divide the {experts} experts, found {groups}"));
        }
        if nodes < 1 || gpus < 1 || gpus % nodes != 0 {
            return fault(format!("gpus must be a multiple of the {nodes} nodes, found {gpus}"));
        }
        if replicas < experts || replicas % gpus != 0 {
            return fault(format!(
                "replicas must be a multiple of the {gpus} gpus and at least the {experts} experts, \
                 found {replicas}"
            ));
        }
        Ok(())
    }
}

/// Places one layer.
fn place(load: &[f32], cluster: Cluster, slots: &mut [i64], ranks: &mut [i64], counts: &mut [i64]) {
    let Cluster { experts, replicas, groups, nodes, gpus } = cluster;
    let group_size = experts / groups;
    let group_load: Vec<f32> = load.chunks_exact(group_size).map(|group| group.iter().sum()).collect();
    let (node_experts, node_slots) = (experts / nodes, replicas / nodes);
    let gpu_slots = replicas / gpus;
    // The experts of each node, group by group.
    let mut local = vec![0; experts];
    for (group, (node, rank)) in pack(&group_load, nodes).into_iter().enumerate() {
        for i in 0..group_size {
            local[node * node_experts + rank * group_size + i] = group * group_size + i;
        }
    }
    for (node, local) in local.chunks_exact(node_experts).enumerate() {
        let local_load: Vec<f32> = local.iter().map(|&expert| load[expert]).collect();
        let (replica, rank, count) = replicate(&local_load, node_slots);
        let replica_load: Vec<f32> = replica.iter().map(|&e| local_load[e] / count[e] as f32).collect();
        for (i, (gpu, place)) in pack(&replica_load, gpus / nodes).into_iter().enumerate() {
            let slot = node * node_slots + gpu * gpu_slots + place;
            slots[slot] = local[replica[i]] as i64;
            ranks[slot] = rank[i];
        }
        for (&expert, count) in local.iter().zip(count) {
            counts[expert] = count;
        }
    }
}

/// Deals items to equally many places of each bin: by descending load, to the lightest bin with room. For each
/// item its bin and its place there.
fn pack(load: &[f32], bins: usize) -> Vec<(usize, usize)> {
    let room = load.len() / bins;
    if room == 1 {
        return (0..load.len()).map(|i| (i, 0)).collect();
    }
    let mut order: Vec<usize> = (0..load.len()).collect();
    order.sort_by(|&a, &b| load[b].total_cmp(&load[a]));
    let mut to = vec![(0, 0); load.len()];
    let mut filled = vec![(0.0f32, 0); bins];
    for item in order {
        let mut lightest = usize::MAX;
        for (bin, &(weight, used)) in filled.iter().enumerate() {
            if used < room && (lightest == usize::MAX || weight < filled[lightest].0) {
                lightest = bin;
            }
        }
        let (weight, used) = &mut filled[lightest];
        to[item] = (lightest, *used);
        *weight += load[item];
        *used += 1;
    }
    to
}

/// Gives each further slot to the item with the largest load a replica. Item and rank of each slot, and the
/// number of slots of each item.
fn replicate(load: &[f32], slots: usize) -> (Vec<usize>, Vec<i64>, Vec<i64>) {
    let mut item: Vec<usize> = (0..load.len()).collect();
    let mut rank = vec![0; load.len()];
    let mut count = vec![1; load.len()];
    let mut share = load.to_vec();
    for _ in load.len()..slots {
        let mut most = 0;
        for (i, &x) in share.iter().enumerate() {
            if x > share[most] {
                most = i;
            }
        }
        item.push(most);
        rank.push(count[most]);
        count[most] += 1;
        share[most] = load[most] / count[most] as f32;
    }
    (item, rank, count)
}
