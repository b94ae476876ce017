use crate::parallel::Disjoint;
use crate::{Error, Threads};

/// Assignments from which on several threads share the work.
const PARALLEL: usize = 1 << 15;

/// Where the assignments of a batch go when they are sorted by expert, the earlier first among equals.
pub struct Plan<'a> {
    /// `[n]`: the assignment in each sorted row.
    pub order: &'a mut [i64],
    /// `[n]`: the sorted row of each assignment.
    pub inverse: &'a mut [i64],
    /// `[n]`: the token of each sorted row.
    pub token: &'a mut [i64],
    /// `[experts]`: rows of each expert.
    pub counts: &'a mut [i32],
    /// `[experts]`: end of each expert's rows.
    pub offsets: &'a mut [i32],
}

/// Sorts assignments `ids`, `top_k` a token. The id `experts` means "no expert": last, and not counted.
///
/// A counting sort: each thread counts a stretch of assignments, and from all counts follows where each
/// stretch's first row of each expert lies.
pub fn plan(threads: Threads, ids: &[i64], experts: usize, top_k: usize, plan: Plan) -> Result<(), Error> {
    let n = ids.len();
    check_sizes(n, experts, top_k, &plan)?;
    let stretches = if n < PARALLEL { 1 } else { threads.count() };
    let tokens = (n / top_k).div_ceil(stretches);
    let stretch = |i: usize| &ids[(i * tokens * top_k).min(n)..((i + 1) * tokens * top_k).min(n)];

    let places = experts + 1;
    let mut rows = vec![0u32; stretches * places];
    let mut faults = vec![None; stretches];
    let (all_rows, all_faults) = (Disjoint::new(&mut rows), Disjoint::new(&mut faults));
    threads.run(stretches, |i| {
        // SAFETY: the parts of one stretch.
        let (counts, fault) = unsafe { (all_rows.part(i * places, places), all_faults.part(i, 1)) };
        fault[0] = count(stretch(i), counts).err().map(|at| i * tokens * top_k + at);
    });
    if let Some(at) = faults.into_iter().flatten().next() {
        return Err(Error::Argument(format!(
            "ids must be in 0..={experts} ({experts} means no expert), found {} at token {}",
            ids[at],
            at / top_k
        )));
    }

    let mut row = 0;
    for expert in 0..places {
        let start = row;
        for stretch in rows.chunks_exact_mut(places) {
            row += std::mem::replace(&mut stretch[expert], row);
        }
        if expert < experts {
            plan.counts[expert] = (row - start) as i32;
            plan.offsets[expert] = row as i32;
        }
    }

    let all_rows = Disjoint::new(&mut rows);
    let (order, token) = (Disjoint::new(plan.order), Disjoint::new(plan.token));
    let inverse = Disjoint::new(plan.inverse);
    threads.run(stretches, |i| {
        let first = i * tokens * top_k;
        // SAFETY: the parts of one stretch.
        let (next, inverse) =
            unsafe { (all_rows.part(i * places, places), inverse.part(first, tokens * top_k)) };
        // Two passes: a counter is not read behind writes to places that hang on another.
        for (&id, inverse) in stretch(i).iter().zip(inverse.iter_mut()) {
            let next = &mut next[id as usize];
            *inverse = i64::from(*next);
            *next += 1;
        }
        let mut assignment = first as i64;
        for (at, rows) in (i * tokens..).zip(inverse.chunks_exact(top_k)) {
            for &row in rows {
                // SAFETY: the counts give each assignment a row of its own, below n.
                unsafe {
                    order.write(row as usize, assignment);
                    token.write(row as usize, at as i64);
                }
                assignment += 1;
            }
        }
    });
    Ok(())
}

fn check_sizes(n: usize, experts: usize, top_k: usize, plan: &Plan) -> Result<(), Error> {
    const MOST: usize = i32::MAX as usize;
    if !(1..=MOST).contains(&experts) || n > MOST {
        return Err(Error::Argument(format!(
            "experts must be in 1..={MOST} and the assignments at most as many, found {experts} and {n}"
        )));
    }
    if top_k < 1 || !n.is_multiple_of(top_k) {
        return Err(Error::Argument(format!("top_k must divide the {n} assignments, found {top_k}")));
    }
    for (name, len, expected) in [
        ("order", plan.order.len(), n),
        ("inverse", plan.inverse.len(), n),
        ("token", plan.token.len(), n),
        ("counts", plan.counts.len(), experts),
        ("offsets", plan.offsets.len(), experts),
    ] {
        if len != expected {
            return Err(Error::Argument(format!("{name} must have {expected} elements, found {len}")));
        }
    }
    Ok(())
}

/// Counts ids; an error is the place of the first that has no counter.
fn count(ids: &[i64], counts: &mut [u32]) -> Result<(), usize> {
    for (at, &id) in ids.iter().enumerate() {
        let Some(count) = usize::try_from(id).ok().and_then(|id| counts.get_mut(id)) else {
            return Err(at);
        };
        *count += 1;
    }
    Ok(())
}
