//! y = x Wᵀ + b for a few rows x: every weight is read once, so memory bandwidth is the floor.
//!
//! Products are accumulated in f32. Weights are f32 or bf16 (bit patterns); half the bytes, half the time.

mod kernel;

pub use kernel::{MAX_ROWS, Matrix, Weights, linear};
