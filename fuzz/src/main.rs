//! One of embassy's fuzz targets under libFuzzer: `FUZZ_TARGET=<name> fuzz <folder of inputs>...`; see `make fuzz`.

#![no_main]

use std::sync::LazyLock;

use embassy::fuzzing::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let wanted = std::env::var("FUZZ_TARGET").unwrap_or_default();
    match TARGETS.iter().find(|(name, _)| *name == wanted) {
        Some((_, target)) => *target,
        None => {
            let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
            eprintln!("FUZZ_TARGET {wanted:?}: expected one of {}", names.join(", "));
            std::process::exit(2);
        }
    }
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| (*TARGET)(input));
