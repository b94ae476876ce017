//! Decoding one token at a time on a CPU. Weights and caches are read once, so memory bandwidth is the floor;
//! what a tensor library spends between its many small calls is what there is to win.
//!
//! Arithmetic is in f32. Inputs that may be bf16 are bit patterns (`u16`).

mod attention;
mod conv;
mod experts;
mod linear;
mod norm;
mod outer;
mod parallel;
mod product;
mod rope;
mod ssd;
mod value;

pub use attention::{Attention, Cached, Latent, attention, latent_attention};
pub use conv::{Conv, conv, conv_step};
pub use experts::{Activation, Experts, experts};
pub use linear::{Matrix, linear};
pub use norm::{Gate, gated_rms_norm, rms_norm};
pub use parallel::Threads;
pub use rope::{Rope, rope};
pub use ssd::{SsdScan, SsdStep, ssd_scan, ssd_step};
pub use value::Value;
