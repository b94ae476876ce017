use archzoo_simd::math::exp;
use archzoo_simd::{InstructionSet, multiversion};

/// One step of a causal depthwise convolution: `state` `[rows, k, c]` moves one input to the left and takes
/// in `x` `[rows, c]`; `out = silu?(Σ_k state·weight + bias)`. `weight` is `[c, k]`.
///
/// # Panics
/// When a length does not fit.
pub fn conv_step(
    x: &[f32],
    state: &mut [f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    k: usize,
    silu: bool,
    out: &mut [f32],
) {
    assert!(k > 0 && weight.len().is_multiple_of(k), "the weight does not fit");
    let c = weight.len() / k;
    if c == 0 {
        return;
    }
    assert!(
        x.len().is_multiple_of(c) && out.len() == x.len() && state.len() == x.len() * k,
        "lengths do not fit"
    );
    assert!(bias.is_none_or(|b| b.len() == c), "the bias does not fit");
    step(InstructionSet::current(), x, state, weight, bias, k, silu, out);
}

multiversion! {
    fn step(x: &[f32], state: &mut [f32], weight: &[f32], bias: Option<&[f32]>, k: usize, silu: bool, out: &mut [f32]) {
        let c = weight.len() / k;
        for ((x, out), state) in
            x.chunks_exact(c).zip(out.chunks_exact_mut(c)).zip(state.chunks_exact_mut(k * c))
        {
            state.copy_within(c.., 0);
            state[(k - 1) * c..].copy_from_slice(x);
            match bias {
                Some(bias) => out.copy_from_slice(bias),
                None => out.fill(0.0),
            }
            for (tap, state) in state.chunks_exact(c).enumerate() {
                for ((o, s), w) in out.iter_mut().zip(state).zip(weight.chunks_exact(k)) {
                    *o += s * w[tap];
                }
            }
            if silu {
                for o in out.iter_mut() {
                    *o /= 1.0 + exp(-*o);
                }
            }
        }
    }
}
