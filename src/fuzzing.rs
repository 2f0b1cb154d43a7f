//! Parses any bytes as input from outside: nothing may panic, and parsed values must be consistent.
//!
//! `make fuzz` runs each target under libFuzzer (see `fuzz/`). The test below does a little of it with every test run.

use std::{collections::HashMap, net::IpAddr};

use crate::{
    capture::{input, iptables, netlink},
    config::{Config, NoConfig},
    descriptor::Descriptor,
    discovery::{
        consul, dns,
        docker::offers::{Made, Offers},
        etcd, file,
    },
    docker::follow,
    provider::{bindings::bindings, docker::Listings},
    registry, state, takeover,
};

/// Parses its input, and panics if that shows a bug.
pub type Target = fn(&[u8]);

/// All targets, by name. `fuzz/seeds/<name>/` contains initial inputs.
pub const TARGETS: [(&str, Target); 14] = [
    ("descriptor", descriptor),
    ("variables", variables),
    ("command_line", command_line),
    ("consul", consul::fuzz),
    ("etcd_v2", registry::etcd::v2::answers::fuzz),
    ("etcd_value", etcd::value::fuzz),
    ("docker", docker),
    ("catalogue", file::catalogue::fuzz),
    ("dns", dns::fuzz),
    ("state", state::document::fuzz),
    ("iptables", iptables::fuzz),
    ("input_chains", input::fuzz),
    ("netlink", netlink::fuzz),
    ("takeover", takeover::message::fuzz),
];

/// An accepted descriptor is the same when it is written and parsed again.
fn descriptor(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    if let Ok(descriptor) = text.parse::<Descriptor>() {
        assert_eq!(descriptor.to_string().parse().as_ref(), Ok(&descriptor), "{text:?}");
    }
}

/// The lines are a container's variables, and also its labels.
fn variables(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let labels = text.lines().filter_map(|line| line.split_once('='));
    let (bindings, _) = bindings(&"app".into(), "BACKEND_", text.lines(), labels);
    let port =
        |binding: &crate::consumer::Binding| (binding.descriptor.port, binding.descriptor.protocol);
    let mut ports: Vec<_> = bindings.iter().map(port).collect();
    ports.dedup();
    assert_eq!(ports.len(), bindings.len(), "one binding for each port of a protocol");
}

/// The lines are an engine's answers and events. Deriving step by step gives the same as deriving at once.
fn docker(input: &[u8]) {
    let new = || Listings::new("BACKEND_".to_owned());
    let (mut listings, mut made) = (new(), [Made::default(), Made::default()]);
    follow::fuzz(input, |mut inventory| {
        assert_eq!(listings.of(&inventory), new().of(&inventory));
        for (made, is_here) in made.iter_mut().zip([true, false]) {
            inventory.host = Some(IpAddr::from([10, 0, 0, 1]));
            let offers = Offers::of(&inventory, is_here, made);
            assert!(offers == Offers::of(&inventory, is_here, &mut Made::default()));
        }
    });
}

/// Lines that begin with a dash are arguments, other lines with `=` are variables.
fn command_line(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let (words, others): (Vec<_>, Vec<_>) = text.lines().partition(|line| line.starts_with('-'));
    let env: HashMap<_, _> = others.iter().filter_map(|line| line.split_once('=')).collect();
    let words = words.into_iter().map(str::to_owned);
    let read = Config::parse(words, &|name| env.get(name).map(|value| (*value).to_owned()));
    if let Err(NoConfig::Usage(error)) = read {
        assert_eq!(error.to_string().lines().count(), 1, "a complaint is one line: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::Path,
        time::{Duration, Instant},
    };

    use super::*;

    /// Total time for all targets, in seconds. `FUZZ_SECONDS` sets another. libFuzzer finds more, but takes longer.
    const TIME: u32 = 3;

    #[test]
    fn nothing_from_outside_panics() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
        let seconds = std::env::var("FUZZ_SECONDS").map_or(TIME, |text| text.parse().unwrap());
        let time = Duration::from_secs(seconds.into()) / TARGETS.len() as u32;
        // One after the other, because other tests run at the same time.
        for (name, target) in TARGETS {
            let seeds = fs::read_dir(folder.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
            let seeds: Vec<_> = seeds.map(|seed| fs::read(seed.unwrap().path()).unwrap()).collect();
            let inputs = run(name, target, &seeds, time);
            println!("{name}: {inputs} inputs");
        }
    }

    fn run(name: &str, target: Target, seeds: &[Vec<u8>], time: Duration) -> usize {
        let (start, mut inputs) = (Instant::now(), seeds.len());
        for seed in seeds {
            target(seed);
        }
        while start.elapsed() < time {
            inputs += 1;
            let number = fastrand::u64(..);
            let input = mutated(seeds, number);
            if std::panic::catch_unwind(|| target(&input)).is_err() {
                panic!("{name}, mutation {number}: {}", input.escape_ascii());
            }
        }
        inputs
    }

    /// A seed with a few changes. The same number gives the same changes.
    fn mutated(seeds: &[Vec<u8>], number: u64) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(number);
        let mut input = random.choice(seeds).cloned().unwrap_or_default();
        for _ in 0..random.usize(1..8) {
            let at = random.usize(..=input.len());
            let end = random.usize(at..=input.len().min(at + 16));
            let piece = random.choice(seeds).map_or(&[][..], |other| {
                let from = random.usize(..=other.len());
                &other[from..random.usize(from..=other.len().min(from + 16))]
            });
            match random.u8(..4) {
                0 => drop(input.splice(at..end, [random.u8(..)])),
                1 => drop(input.splice(at..end, piece.iter().copied())),
                2 => drop(input.splice(at..at, piece.iter().copied())),
                _ => drop(input.drain(at..end)),
            }
        }
        input
    }
}
