//! Mixture-of-experts routing on the CPU: from router logits to expert ids and weights, to the order of the rows
//! of each expert, and from loads to a placement of experts.
//!
//! Results of the gate are bitwise equal on every instruction set: the kernel is one generic body without fused
//! multiply-adds, compiled once per set, and sums run over a fixed number of lanes.

mod eplb;
mod gate;
mod parallel;
mod plan;
mod top_k;

pub use archzoo_simd::InstructionSet;
pub use eplb::{Cluster, Placement, eplb};
pub use gate::{Gate, GroupScore, Logits, Score, gate, gate_with};
pub use parallel::Threads;
pub use plan::{Plan, plan};

use std::fmt;

/// Why a routing call was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// An argument is out of its range; says which, what was expected and what was found.
    Argument(String),
    /// The scores of this token are not numbers.
    NotANumber {
        /// Row of the logits.
        token: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Argument(message) => f.write_str(message),
            Error::NotANumber { token } => write!(
                f,
                "router scores of token {token} are NaN: its logits hold a NaN, or infinities that cancel"
            ),
        }
    }
}

impl std::error::Error for Error {}
