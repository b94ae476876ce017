//! Instruction sets chosen at run time, and arithmetic that vectorises on each of them.

mod instruction_set;
pub mod math;

pub use instruction_set::{InstructionSet, has_bfloat16};

/// Defines `fn name(set, args...)`: one body, compiled for every instruction set, run on the one given.
///
/// The body must not panic across lanes it does not own and has no return value.
#[macro_export]
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$generic: $bound>)? (set: $crate::InstructionSet, $($arg: $ty),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body $(<$generic: $bound>)? ($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$generic: $bound>)? ($($arg: $ty),*) {
                body($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,bmi1,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl")]
            #[allow(clippy::too_many_arguments)]
            fn avx512 $(<$generic: $bound>)? ($($arg: $ty),*) {
                body($($arg),*)
            }

            match set {
                // SAFETY: an InstructionSet is only made where the CPU supports it.
                #[cfg(target_arch = "x86_64")]
                $crate::InstructionSet::Avx512 if set.is_supported() => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::InstructionSet::Avx2 if set.is_supported() => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}
